"""A dictionary without an encoder: its codes are searched for."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.pursuit import Dictionary, Method, pursue
from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.saes.base import BaseSAE, check_sizes, check_units
from sae_lab.saes.dictionary import DictionarySAE
from sae_lab.saes.parts.unit_norm import divide_by_norm


class PursuitSAE(DictionarySAE):
    """z = what k steps of a pursuit find for   min_z |x - b_dec - z W_dec|²,   z >= 0,   at most k latents a row

    The pursuits are those of pursuit.py. No gradient flows through the code: training alternates between searching
    for codes in the dictionary and a step of the dictionary for these codes, as dictionary learners do (Engan et al.
    1999; Mairal et al. 2009). For a code that is a least-squares solution on its latents, as that of orthogonal
    matching pursuit is, this is the whole gradient: the error does not change with z there.

    Any SAE's dictionary can be searched in: `PursuitSAE.of(sae, "gradient_pursuit")`, and sae=pursuit init_from=RUN
    goes on from there. After sae-kit, which lists optimising dictionaries under nonlinear encodings among its uses.

    Args:
        k: steps, and so the number of active latents a row at most.
        method: a key of pursuit.METHODS.

    Raises:
        UserError: no such method, or k is not a whole number between 1 and the size of the dictionary.
    """

    def __init__(self, k: int, method: Method = "orthogonal_matching_pursuit", **dictionary: Any):
        super().__init__(**dictionary)
        if self.n_inputs:
            raise SettingError("a pursuit looks for codes of the rows that they explain: leave {n_inputs}=0.")
        if not 1 <= k <= self.n_latents:
            raise SettingError(
                f"{{k}}={k} must be a whole number from 1 to the dictionary's {self.n_latents} latents: "
                "a pursuit takes k steps."
            )
        self.k, self.method = k, method

    @classmethod
    def of(cls, sae: BaseSAE, method: Method, k: int | None = None) -> "PursuitSAE":
        """The dictionary, normalisation and b_dec of `sae`; k is by default its own."""
        require_dictionary(sae)
        k = sae.config.get("k") if k is None else k
        if k is None:
            raise UserError(f"a {type(sae).__name__} has no k of its own: give pursuit.k=<latents a row at most>.")
        return sae.convert_to(cls, method=method, k=k)

    @torch.no_grad()
    def start_from(self, other: BaseSAE) -> None:
        """Take over W_dec, its rows divided by their norms, b_dec and their units; an encoder is left behind."""
        source = require_dictionary(other)
        check_sizes(self, source)
        check_units(self, source)
        self.sources.load_state_dict(source.sources.state_dict())
        self.W_dec.copy_(source.W_dec)
        self.b_dec.copy_(source.b_dec)
        divide_by_norm(self.W_dec, self.decoder_norm)

    def encode_normalized(self, x: Float[Tensor, "b s d"]) -> tuple[SparseCode, None]:
        y, rows = (x - self.b_dec).detach().flatten(1), self.W_dec.detach().flatten(1)
        gram = len(y) * self.k > self.n_latents  # the matrix costs f / b products and saves about half of k
        return pursue(self.method, y, Dictionary(rows, gram), self.k), None


def require_dictionary(sae: BaseSAE) -> DictionarySAE:
    """`sae`, if it has one W_dec.

    Raises:
        UserError: it has not.
    """
    if not isinstance(sae, DictionarySAE):
        raise UserError(f"a {type(sae).__name__} has no W_dec of its own to search in.")
    return sae
