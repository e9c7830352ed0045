"""Selection with a number of entries that is known in advance: no shape depends on data, and the host reads nothing.

The rules are those of selection.py, and so are their results. The codes differ in form: they are *padded*, so that a
whole training step can be captured in one CUDA graph. A padded code has n entries (k·b for k per row):

- the selected entries first, by row and then by latent; `row_offsets` counts only these, so row_offsets[b] <= n;
- then, if fewer than n entries are positive, padding: latent f (out of range on purpose) and value 0.

A NaN is never selected. On a GPU the kernels of fixed_selection_triton.py do the work, elsewhere (and for float64) the
torch functions at the end of this file.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.ops.sparse import HAS_TRITON, Pattern, SparseCode

LOWERED = 0.875
"""The next step's guess of the n-th largest value, as a fraction of this step's. A smaller one lets more candidates
through, a larger one fails more often when the pre-activations shrink."""


def top_of_batch(h: Float[Tensor, "b f"], n: int, lower: Float[Tensor, ""]) -> SparseCode:
    """Keep the n largest positive entries of h, as a padded code. Among ties the lowest positions are kept.

    The choice is made over h alone: with several processes, each chooses from its own rows.

    Args:
        lower: a float32 guess of a bound a little below the n-th largest value, on the device of h. It is updated in
            place to a guess for the next batch. It changes how fast the selection is and never the result. Start at 0.
    """
    if n == 0 or h.numel() == 0:
        return _nothing(h, n)
    if _has_kernels(h):
        from sae_lab.ops import fixed_selection_triton  # here, because importing Triton takes a second

        return fixed_selection_triton.top_of_batch(h, n, lower, LOWERED)
    return top_of_batch_torch(h, n, lower)


def top_of_rows(h: Float[Tensor, "b f"], k: int) -> SparseCode:
    """Keep the k largest positive entries of each row, as a padded code. Among ties the lowest latents are kept."""
    if k == 0 or h.numel() == 0:
        return _nothing(h, k * len(h))
    if _has_kernels(h):
        from sae_lab.ops import fixed_selection_triton

        return fixed_selection_triton.top_of_rows(h, k)
    return top_of_rows_torch(h, k)


def _has_kernels(h: Tensor) -> bool:
    return h.is_cuda and HAS_TRITON and h.dtype != torch.float64


def _nothing(h: Float[Tensor, "b f"], n: int) -> SparseCode:
    """Return a code of padding alone."""
    row_offsets = torch.zeros(len(h) + 1, dtype=torch.int64, device=h.device)
    latents = row_offsets.new_full((n,), h.shape[1])
    return SparseCode(Pattern(row_offsets, latents, h.shape[1], padded=True), h.new_zeros(n))


@torch.no_grad()
def top_of_batch_torch(h: Float[Tensor, "b f"], n: int, lower: Float[Tensor, ""]) -> SparseCode:
    """Compute `top_of_batch` by torch's operations. The guess is updated but not used."""
    kept, nth = mark_largest(_positive(h).flatten(), n)
    lower.copy_(nth.squeeze(0).float() * LOWERED)
    return _compact(kept.view_as(h), h, n)


@torch.no_grad()
def top_of_rows_torch(h: Float[Tensor, "b f"], k: int) -> SparseCode:
    """Compute `top_of_rows` by torch's operations."""
    return _compact(mark_largest(_positive(h), k)[0], h, k * len(h))


def _positive(h: Tensor) -> Tensor:
    """Compute relu(h), with 0 for NaN."""
    return torch.where(h > 0, h, torch.zeros_like(h))


def mark_largest(z: Float[Tensor, "*b m"], k: int) -> tuple[Bool[Tensor, "*b m"], Float[Tensor, "*b 1"]]:
    """Mark the k largest positive entries along the last axis, the first ones among ties, and return the k-th largest.

    The k-th largest is 0 if fewer than k entries are positive.
    """
    if k > z.shape[-1]:
        return z > 0, z.new_zeros((*z.shape[:-1], 1))
    kth = z.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    larger, tied = z > kth, (z == kth) & (z > 0)
    return larger | tied & (tied.cumsum(dim=-1) <= k - larger.sum(dim=-1, keepdim=True)), kth


def _compact(kept: Bool[Tensor, "b f"], h: Float[Tensor, "b f"], n: int) -> SparseCode:
    """Return the marked entries of h, at most n, as a padded code of n entries."""
    n_rows, n_latents = h.shape
    flat = kept.flatten()
    place = torch.where(flat, flat.cumsum(dim=0) - 1, n)  # the entry n takes what is not kept, and is cut off
    latents = torch.arange(n_latents, device=h.device).expand(n_rows, -1).flatten()
    padding = torch.full((n + 1,), n_latents, dtype=torch.int64, device=h.device)
    row_offsets = F.pad(kept.sum(dim=-1).cumsum(dim=0), (1, 0))
    pattern = Pattern(row_offsets, padding.scatter(0, place, latents)[:n].contiguous(), n_latents, padded=True)
    return SparseCode(pattern, h.new_zeros(n + 1).scatter(0, place, h.flatten())[:n].contiguous())
