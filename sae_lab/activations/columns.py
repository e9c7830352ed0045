"""Which columns of activations belong to some of the sites that were read together."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


class Columns:
    """Selects the columns of some sites from activations `(..., s, d)`, in the order of these sites.

    The result is contiguous, as if only these sites had been read. All columns in their order are not copied.

    Args:
        among: the sites of axis s, distinct.
        sites: the sites to select; each is one of `among`.
    """

    def __init__(self, among: Sequence[str], sites: Sequence[str]):
        self.indices = [list(among).index(site) for site in sites]
        self.all_in_order = self.indices == list(range(len(among)))

    def __call__(self, x: Shaped[Tensor, "*rows s d"]) -> Shaped[Tensor, "*rows c d"]:
        # Not x[..., indices, :]: on a GPU that copies the indices each time, and the host waits.
        return x if self.all_in_order else torch.stack([x[..., i, :] for i in self.indices], dim=-2)
