"""Which sources of a row an SAE reads, which ones it predicts, and how both are normalized."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab.runtime.errors import SettingError
from sae_lab.saes.parts.normalize import NORMALIZERS, Context, Normalization

SHARED = ", ".join(word for word, normalizer in NORMALIZERS.items() if normalizer.shared) + " or none"
"""Normalizations that treat all rows alike, for messages."""


class Sources(nn.Module):
    """The r sources that are read, the w sources that are predicted, and their normalizers.

    An SAE reads all s sources and predicts the same ones: r = w = s. A transcoder reads the first r = n_inputs and
    predicts the w = s - r others; each of the two groups has its own normalizer.

    Args:
        d_in: d.
        n_sources: s.
        n_inputs: the first n_inputs sources are only read. 0: every source is read and predicted.
        normalize: a key of NORMALIZERS.

    Raises:
        UserError: no source is left to predict, undoing the normalization would need the predicted rows themselves, or
            the normalization leaves nothing of rows of width d.
    """

    def __init__(self, d_in: int, n_sources: int = 1, n_inputs: int = 0, normalize: Normalization = "per_token"):
        super().__init__()
        check_inputs(n_inputs, n_sources, normalize)
        check_width(d_in, normalize)
        self.n_sources, self.n_inputs = n_sources, n_inputs
        self.n_read, self.n_written = n_inputs or n_sources, n_sources - n_inputs
        self.normalizer = NORMALIZERS[normalize](self.n_read, d_in)
        self.target_normalizer = NORMALIZERS[normalize](self.n_written, d_in) if n_inputs else None

    def observe(self, rows: Float[Tensor, "b s d"]) -> None:
        """Let the normalizers measure what they need on a training batch. Called before its forward pass."""
        self.normalizer.observe(rows[:, : self.n_read])
        if self.target_normalizer is not None:
            self.target_normalizer.observe(rows[:, self.n_inputs :])

    def forward(self, rows: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b w d"]]:
        """Return the normalized rows that are read, and those that x_hat is compared with."""
        read, _ = self.normalizer(rows[:, : self.n_read])
        return read, read if self.target_normalizer is None else self.target_normalizer(rows[:, self.n_inputs :])[0]

    def n_sources_given(self, x: Tensor) -> int:
        """Return how many sources x should have: all s, or r if x holds a transcoder's inputs alone."""
        alone = self.n_inputs > 0 and (x.ndim < 3 or x.shape[-2] == self.n_inputs)
        return self.n_inputs if alone else self.n_sources

    def read(self, rows: Float[Tensor, "b s_or_r d"]) -> tuple[Float[Tensor, "b r d"], Context]:
        """Return the normalized rows that are read, and the context that gives x_hat its raw units."""
        read, context = self.normalizer(rows[:, : self.n_read])
        return read, context if self.target_normalizer is None else self.target_normalizer.constant()

    def undo(self, x_hat: Float[Tensor, "b w d"], context: Context) -> Float[Tensor, "b w d"]:
        """Return x_hat in raw units."""
        return self.normalizer.undo(x_hat, context)

    def undo_shared(self, x_hat: Float[Tensor, "b w d"]) -> Float[Tensor, "b w d"]:
        """Return x_hat in raw units if all rows have the same; otherwise as it is."""
        normalizer = self.target_normalizer or self.normalizer
        return x_hat if normalizer.by_row else normalizer.undo(x_hat, normalizer.constant())

    def unwhiten(self, directions: Float[Tensor, "f w d"]) -> Float[Tensor, "f w d"]:
        """Return directions of x_hat as directions of activations."""
        return (self.target_normalizer or self.normalizer).unwhiten(directions)

    def predicted_mask(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        """Return a mask of the predicted sources of each row; None if all are predicted."""
        if not self.n_inputs:
            return None
        return (torch.arange(self.n_sources, device=x.device) >= self.n_inputs).expand(len(x), -1)


def check_inputs(n_inputs: int, n_sources: int, normalize: Normalization) -> None:
    """Raise a SettingError if no source is left to predict, or if its units would depend on the predicted row."""
    if n_inputs and n_inputs >= n_sources:
        raise SettingError(
            f"{{n_inputs}}={n_inputs} of {n_sources} sites leaves none to predict: give lm.sites=[<site to read>,"
            "<site to predict>], or {n_inputs}=0 for an SAE."
        )
    if n_inputs and NORMALIZERS[normalize].by_row:
        raise SettingError(
            f"{{normalize}}={normalize} is impossible for a transcoder, since undoing it needs the row to predict: "
            f"give {{normalize}}={SHARED}."
        )


def check_width(d_in: int, normalize: Normalization) -> None:
    """Raise a SettingError if every normalized row would be the same up to its sign."""
    if d_in == 1 and NORMALIZERS[normalize].by_row:
        raise SettingError(
            f"{{normalize}}={normalize} leaves nothing of activations of width 1, since it scales each row by itself: "
            f"give {{normalize}}={SHARED}."
        )
