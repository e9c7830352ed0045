"""Which sources of a row an SAE reads and which it predicts, and in what units."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab.runtime.errors import SettingError
from sae_lab.saes.parts.normalize import NORMALIZERS, Context, Normalization


class Sources(nn.Module):
    """The r sources that are read, the w sources that are predicted, and their normalizers.

    An SAE reads all s sources and predicts the same ones: r = w = s. A transcoder reads the first r = n_inputs and
    predicts the w = s - r others; the two groups have a normalizer each.

    Args:
        n_sources: s.
        n_inputs: how many sources, the first ones, are only read. 0: every source is read and predicted.
        normalize: a key of NORMALIZERS.

    Raises:
        UserError: no source is left to predict, or the scale of the predicted rows could not be known without them.
    """

    def __init__(self, n_sources: int = 1, n_inputs: int = 0, normalize: Normalization = "per_token"):
        super().__init__()
        check_inputs(n_inputs, n_sources, normalize)
        self.n_sources, self.n_inputs = n_sources, n_inputs
        self.n_read, self.n_written = n_inputs or n_sources, n_sources - n_inputs
        self.normalizer = NORMALIZERS[normalize](self.n_read)
        self.target_normalizer = NORMALIZERS[normalize](self.n_written) if n_inputs else None

    def observe(self, rows: Float[Tensor, "b s d"]) -> None:
        """Before the forward pass of a training batch: let the normalizers take from it what they need."""
        self.normalizer.observe(rows[:, : self.n_read])
        if self.target_normalizer is not None:
            self.target_normalizer.observe(rows[:, self.n_inputs :])

    def forward(self, rows: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b w d"]]:
        """Normalize what is read and what x_hat is compared with."""
        read, _ = self.normalizer(rows[:, : self.n_read])
        return read, read if self.target_normalizer is None else self.target_normalizer(rows[:, self.n_inputs :])[0]

    def n_given(self, x: Tensor) -> int:
        """The number of sources that x is meant to have: a transcoder's inputs may come alone."""
        alone = self.n_inputs > 0 and (x.ndim == 2 or x.shape[1] == self.n_inputs)
        return self.n_inputs if alone else self.n_sources

    def read(self, rows: Float[Tensor, "b s_or_r d"]) -> tuple[Float[Tensor, "b r d"], Context]:
        """Normalize what is read; the context gives x_hat its units."""
        read, context = self.normalizer(rows[:, : self.n_read])
        return read, context if self.target_normalizer is None else self.target_normalizer.constant()

    def undo(self, x_hat: Float[Tensor, "b w d"], context: Context) -> Float[Tensor, "b w d"]:
        """x_hat in raw units."""
        return self.normalizer.undo(x_hat, context)

    def predicted_mask(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        """True at the predicted sources of each row; None where all are predicted."""
        if not self.n_inputs:
            return None
        return (torch.arange(self.n_sources, device=x.device) >= self.n_inputs).expand(len(x), -1)


def check_inputs(n_inputs: int, n_sources: int, normalize: Normalization) -> None:
    """Raise a SettingError unless a source is left to predict, in units that do not depend on the predicted row."""
    if n_inputs and n_inputs >= n_sources:
        raise SettingError(
            f"{{n_inputs}}={n_inputs} of {n_sources} sites leaves none to predict: give lm.sites=[<what is read>,"
            "<what is predicted>], or {n_inputs}=0 for an SAE."
        )
    if n_inputs and NORMALIZERS[normalize].by_row:
        raise SettingError(
            f"{{normalize}}={normalize} takes the scale of what is predicted from itself: give a transcoder "
            "{normalize}=mean_norm or none."
        )
