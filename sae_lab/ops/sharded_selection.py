"""Selection among the latents of all shards: which of the entries that each rank has selected are among the largest.

Each rank selects from the latents that it holds (selection.py), as many as would be selected if all of the largest
were its own. The functions here keep those that are selected among the entries of all ranks, and break ties as one
process does. All that is exchanged has a size that is known in advance:

- by row: k values of each row;
- of the batch: three histograms of 16 KB, a bound and one count per row, whatever k and the number of latents.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from sae_lab.ops.fixed_selection import mark_largest
from sae_lab.ops.sparse import SparseCode, keep_entries
from sae_lab.parallel.collectives import min_over_ranks, sum_over_ranks
from sae_lab.parallel.mesh import data_axis, latent_axis
from sae_lab.parallel.shards import concatenate_shards, max_over_shards, sum_over_shards

DIGIT = 11
"""Bits that one histogram finds: three make a positive float32."""
AT_ONCE = 2**15
"""Numbers that are counted at a time, since counting takes 8 bytes and more for each."""


def keep_top_of_rows(code: SparseCode, k: int) -> SparseCode:
    """Keep the entries of each row that are among the k largest |z| of the row over all shards.

    Among ties the lowest latents are kept.

    Args:
        code: with at most k entries per row.
    """
    offsets, rows, sizes = code.row_offsets, code.pattern.rows, code.values.abs()
    b, own = code.shape[0], latent_axis().index
    places = torch.arange(len(rows), device=rows.device) - offsets[rows]
    cells = (rows * k + places).clamp_max(b * k)  # padding shares a cell that is cut off
    table = sizes.new_zeros(b * k + 1).scatter(0, cells, sizes)[:-1].view(b, k)
    kept = mark_largest(concatenate_shards(table, dim=1), k)[0][:, own * k : (own + 1) * k]
    return keep_entries(code, F.pad(kept.flatten(), (0, 1))[cells])


def keep_top_of_batch(code: SparseCode, n: int) -> tuple[SparseCode, Shaped[Tensor, ""]]:
    """Keep the entries that are among the n largest |z| of all ranks: those of all shards and of the whole batch.

    Among ties the lowest rows are kept, and on a row the lowest latents.

    Returns:
        The code, and the n-th largest |z|; 0 if all ranks have fewer than n entries, which are then all kept.
    """
    sizes = code.values.abs()
    nth, room = find_nth_largest(sizes, n)
    larger, tied = sizes > nth, (sizes == nth) & (sizes > 0)
    return keep_entries(code, larger | tied & (number_marked(code, tied) < room)), nth


def number_marked(code: SparseCode, marked: Bool[Tensor, " nnz"]) -> Int[Tensor, " nnz"]:
    """Number the marked entries of all ranks by row and then by latent, from 0."""
    before = F.pad(marked.cumsum(0), (1, 0))  # marked entries of this rank before each entry
    starts = before[code.row_offsets]
    by_shard = concatenate_shards(starts.diff().unsqueeze(0))  # (m, b)
    on_row = by_shard.sum(dim=0)
    in_earlier_rows, in_earlier_shards = on_row.cumsum(0) - on_row, by_shard[: latent_axis().index].sum(dim=0)
    by_share = on_row.new_zeros(data_axis().size)
    by_share[data_axis().index] = on_row.sum()
    in_earlier_shares = sum_over_ranks(by_share)[: data_axis().index].sum()
    rows = code.pattern.rows.clamp_max(code.shape[0] - 1)  # of padding: any
    return in_earlier_shares + (in_earlier_rows + in_earlier_shards - starts[:-1])[rows] + before[:-1]


def nth_largest(x: Shaped[Tensor, " m"], n: int) -> Shaped[Tensor, ""]:
    """Return the n-th largest of the positive numbers that all ranks hold; 0 if there are fewer."""
    return find_nth_largest(x, n)[0]


def find_nth_largest(x: Shaped[Tensor, " m"], n: int) -> tuple[Shaped[Tensor, ""], Int[Tensor, ""]]:
    """Return the n-th largest of the positive numbers that all ranks hold, and how many of the n largest equal it.

    Both are 0 if there are fewer than n.

    A radix search, since the bits of positive numbers are in their order: a histogram over all ranks gives the first
    DIGIT bits of the number; one over the numbers that begin with these gives the next ones, and so on.
    """
    keys = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    found, rest = torch.zeros(2, dtype=torch.long, device=x.device)
    rest, exists = rest + n, torch.ones((), dtype=torch.bool, device=x.device)
    for shift in reversed(range(0, 8 * x.element_size(), DIGIT)):
        from_top = sum_over_all(count_digits(keys, found, shift)).flip(0).cumsum(0)
        place = (from_top < rest).sum()
        exists, place = exists & (place < len(from_top)), place.clamp_max(len(from_top) - 1)
        rest = rest - F.pad(from_top, (1, 0))[place]
        found = found << DIGIT | (len(from_top) - 1 - place)
    nth, rest = (torch.where(exists, number, 0) for number in (found, rest))
    return nth.to(keys.dtype).view(x.dtype), rest


def count_digits(keys: Int[Tensor, " m"], found: Int[Tensor, ""], shift: int) -> Int[Tensor, " 2**DIGIT"]:
    """Count the DIGIT bits above `shift` of the positive keys whose bits before these are `found`."""
    counts = torch.zeros((1 << DIGIT) + 1, dtype=torch.long, device=keys.device)
    for part in keys.split(AT_ONCE):
        digits = part.long() >> shift
        counted = (part > 0) & (digits >> DIGIT == found)
        at = torch.where(counted, digits & ((1 << DIGIT) - 1), 1 << DIGIT)  # the others share the last place
        counts.scatter_add_(0, at, torch.ones_like(at))
    return counts[:-1]


def sum_over_all(x: Tensor) -> Tensor:
    """Return the sum over all ranks: those with other latents and those with other rows."""
    return sum_over_ranks(sum_over_shards(x))


def max_over_all(x: Shaped[Tensor, ""]) -> Tensor:
    """Return the maximum over all ranks. An int16 becomes an int32, since no back end supports it."""
    y = x.to(torch.int32) if x.dtype == torch.int16 else x
    return max_over_shards(-min_over_ranks(-y))
