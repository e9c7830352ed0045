"""Which sources of a row an SAE reads and which it predicts, in what units: SAEs, crosscoders and transcoders."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.runtime.checks import checked_number
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.parts.normalize import NORMALIZERS, Context, build_normalizer


class Transcodable(BaseSAE):
    """An SAE reads all sources of a row and gives them back; a transcoder reads the first, x, and predicts the others:

    z = activate(x W_encᵀ [+ b_enc]),   y_hat = z W_dec + b_dec [+ x W_skip],   loss = mean (y - y_hat)² + aux

    Where x is what an MLP reads and y what it writes, latents stand for what the MLP computes, and the weights alone
    tell what makes them active. Any SAE with a linear encoder is one by sae.n_inputs=1 of two sites. Dunefsky,
    Chlenski, Nanda 2024, arXiv 2406.11944; the skip connection, which takes over what is linear in x: Paulo, Shabalin,
    Belrose 2025, arXiv 2501.18823.

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        n_inputs: how many of them, the first ones, are input alone: x_hat is of the others. 0: every source is both.
        normalize: `per_token`, `none`, `constant_norm` or `mean_norm` (see saes/normalize.py).

    Raises:
        UserError: an unknown word, no source left to predict, or units that depend on the row that is predicted.
    """

    def __init__(self, d_in: int, n_latents: int, n_sources: int = 1, n_inputs: int = 0, normalize: str = "per_token"):
        super().__init__()
        self.d_in, self.n_latents, self.n_sources, self.normalize = d_in, n_latents, n_sources, normalize
        self.n_inputs = checked_inputs(n_inputs, n_sources, normalize)
        self.n_read, self.n_written = self.n_inputs or n_sources, n_sources - self.n_inputs
        self.normalizer = build_normalizer(normalize, self.n_read)
        self.target_normalizer = build_normalizer(normalize, self.n_written) if n_inputs else None

    def observe_rows(self, rows: Float[Tensor, "b s d"]) -> None:
        """Before the forward pass of a training batch: let the normalisers take from it what they need."""
        self.normalizer.observe(rows[:, : self.n_read])
        if self.target_normalizer is not None:
            self.target_normalizer.observe(rows[:, self.n_inputs :])

    def normalize_rows(self, rows: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b w d"]]:
        """What is read, and what x_hat is judged against."""
        read, _ = self.normalizer(rows[:, : self.n_read])
        return read, read if self.target_normalizer is None else self.target_normalizer(rows[:, self.n_inputs :])[0]

    def read(self, x: Tensor) -> tuple[Float[Tensor, "b r d"], Context]:
        """Raw activations, of all sources or of the inputs alone -> what is read, and what gives x_hat its units."""
        alone = self.n_inputs > 0 and (x.ndim == 2 or x.shape[1] == self.n_inputs)
        rows = self.as_rows(x, self.n_inputs) if alone else self.as_rows(x)[:, : self.n_read]
        read, context = self.normalizer(rows)
        return read, context if self.target_normalizer is None else self.target_normalizer.constant()

    def predicted_mask(self, x: Tensor) -> Bool[Tensor, "b s"] | None:
        if not self.n_inputs:
            return None
        return (torch.arange(self.n_sources, device=x.device) >= self.n_inputs).expand(len(x), -1)


def checked_inputs(n_inputs: int, n_sources: int, normalize: str) -> int:
    """n_inputs, if it leaves a source to predict, in units that do not depend on the row that is predicted.

    Raises:
        UserError: it does not.
    """
    n_inputs = checked_number("sae.n_inputs", n_inputs, 0, whole=True)
    if n_inputs and n_inputs >= n_sources:
        raise UserError(
            f"sae.n_inputs={n_inputs} of {n_sources} sites leaves none to predict: give lm.sites=[<what is read>,"
            "<what is predicted>], or sae.n_inputs=0 for an SAE."
        )
    if n_inputs and normalize in NORMALIZERS and NORMALIZERS[normalize].by_row:
        raise UserError(
            f"sae.normalize={normalize} takes the scale of what is predicted from itself: give a transcoder "
            "sae.normalize=mean_norm or none."
        )
    return n_inputs
