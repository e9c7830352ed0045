"""Thresholds by the mean L0 of a batch: how large the entries are of which k are active on a row, on average."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.sharded_selection import nth_largest
from sae_lab.parallel.mesh import data_axis, mesh_size


def n_active(k: float, b: int) -> int:
    """Return how many entries are active in a batch of b rows of each rank, if L0 is k."""
    return max(1, int(k * b * data_axis().size))


def threshold_of_l0(h: Float[Tensor, "*shape"], k: float, b: int) -> Tensor:
    """Return the k·b-th largest of the entries of all latents and b rows, over all ranks; at least 0.

    Args:
        h: these entries, or at least the k·b largest of them.
    """
    n = n_active(k, b)
    return nth_largest(h.flatten(), n) if mesh_size() > 1 else largest_entries(h, n)[-1].clamp_min(0)


def largest_entries(h: Float[Tensor, "*shape"], n: int) -> Float[Tensor, " n"]:
    """Return the n largest entries, or all if there are fewer, in descending order."""
    return h.flatten().topk(min(n, h.numel())).values
