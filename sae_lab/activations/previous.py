"""Activations beside those of the token before, for SAEs that compare neighbours in the text."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel


class WithPrevious:
    """A language model of 2·s sites: its own s, then the same s at the token before in the row.

    A pair is one row of activations, so shuffling, prefetching and resuming keep it together. Use it for the positions
    of `has_previous` alone: the first token of a row has no token before it.

    Args:
        lm: the language model.
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self.sites = (*lm.sites, *(f"{site} at the token before" for site in lm.sites))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t 2*s d"]:
        x = self.lm.activations(tokens)
        return torch.cat([x, x.roll(1, dims=1)], dim=2)

    def copies(self) -> list["WithPrevious"]:
        return [WithPrevious(lm) for lm in self.lm.copies()]


def has_previous(tokens: Int[Tensor, "n t"], keep: Bool[Tensor, "n t"], bos_id: int | None) -> Bool[Tensor, "n t"]:
    """Return which positions are kept and follow, in the same document, a position that is kept.

    A document begins with BOS, in a row as between the documents of a packed row.
    """
    before = F.pad(keep[:, :-1], (1, 0))
    return keep & before if bos_id is None else keep & before & (tokens != bos_id)
