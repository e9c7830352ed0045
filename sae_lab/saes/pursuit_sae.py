"""Pursuit: a dictionary without an encoder, with codes found by search."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from sae_lab.ops.pursuit import Dictionary, Method, pursue
from sae_lab.ops.sparse import SparseCode
from sae_lab.ops.unit_norm import divide_by_norm
from sae_lab.parallel.parts import remember
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.saes.base import BaseSAE, check_sizes, check_units
from sae_lab.saes.dictionary import DictionarySAE


class PursuitSAE(DictionarySAE):
    """Dictionary without an encoder: k steps of a pursuit find the code.

        min_z |x - b_dec - z W_dec|²     with z >= 0 (unless signed) and at most k active latents per row

    ops/pursuit.py has the pursuits. No gradient flows through the code. Training alternates between searching for codes
    in the dictionary and one step of the dictionary for these codes, as dictionary learning does (Engan et al. 1999;
    Mairal et al. 2009). If the code is a least-squares solution on its active latents, as in orthogonal matching
    pursuit, this is the full gradient, because the derivative of the error with respect to z is zero there.

    `PursuitSAE.of(sae, "gradient_pursuit")` searches in the dictionary of any SAE, and sae=pursuit init_from=RUN trains
    that dictionary further. After sae-kit, which names training a dictionary under a nonlinear encoding as a use.

    Args:
        k: number of steps, and so the maximum number of active latents per row.
        method: a key of METHODS in ops/pursuit.py.
        signed: whether z may be negative.

    Raises:
        UserError: the method is unknown, or k is not a whole number between 1 and n_latents.
    """

    sparse_codes = True
    varying_size = "a pursuit keeps as many latents as it needs"

    def __init__(self, k: int, method: Method = "orthogonal_matching_pursuit", signed: bool = False, **dictionary: Any):
        super().__init__(**dictionary)
        if self.n_inputs:
            raise SettingError(
                "a pursuit cannot be a transcoder, since it searches for the code of the rows that it reconstructs: "
                "give {n_inputs}=0."
            )
        if not 1 <= k <= self.n_latents:
            raise SettingError(
                f"{{k}}={k} must be a whole number from 1 to the dictionary's {self.n_latents} latents: "
                "a pursuit takes k steps."
            )
        self.k, self.method, self.signed = k, method, signed

    @classmethod
    def of(cls, sae: BaseSAE, method: Method, k: int | None = None) -> "PursuitSAE":
        """Build a PursuitSAE with the dictionary, b_dec and normalization of `sae`; None: its k as well."""
        require_dictionary(sae)
        k = sae.config.get("k") if k is None else k
        if k is None:
            raise UserError(
                f"a {type(sae).__name__} has no k of its own: give pursuit.k=<maximum number of latents per row>."
            )
        return sae.convert_to(cls, method=method, k=k)

    def with_k(self, k: float) -> Self:
        return self.convert_to(type(self), k=k)

    @torch.no_grad()
    def start_from(self, other: BaseSAE) -> None:
        """Copy W_dec with its rows divided by their norms, b_dec and the normalization, but no encoder."""
        source = require_dictionary(other)
        check_sizes(self, source)
        check_units(self, source)
        self.sources.load_state_dict(source.sources.state_dict())
        self.W_dec.copy_(source.W_dec)
        self.b_dec.copy_(source.b_dec)
        divide_by_norm(self.W_dec, self.decoder_norm)
        self._has_start = self._has_start or source.has_start

    def encode_normalized(self, x: Float[Tensor, "b s d"]) -> tuple[SparseCode, None]:
        y, rows = (x - self.b_dec).detach().flatten(1), self.W_dec.detach().flatten(1)
        gram = len(y) * self.k > self.n_latents  # the Gram matrix costs f / b products and saves about k / 2
        search = partial(pursue, self.method, y, Dictionary(rows, gram), self.k, self.signed)
        return remember(search), None


def require_dictionary(sae: BaseSAE) -> DictionarySAE:
    """Return `sae` if it has a W_dec of its own.

    Raises:
        UserError: it has none.
    """
    if not isinstance(sae, DictionarySAE):
        raise UserError(f"a {type(sae).__name__} has no W_dec of its own to search in.")
    return sae
