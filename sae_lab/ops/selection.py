"""Selection of active latents: rules that read the pre-activations h in pieces of rows and keep the selected entries.

Every rule is exact, selects only positive entries and breaks ties by the lowest position, so the code does not depend
on how h is cut into pieces. With `signed`, a rule compares |h| instead of h, and the selected entries keep their sign.
On a CPU the primitives at the end of this file use numpy, whose search and partition with AVX-512 are several times
faster than torch's.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.ops.fixed_selection import top_of_batch, top_of_rows
from sae_lab.ops.fixed_size import is_fixed_size, numpy_may_read
from sae_lab.ops.matmul import linear_by_part
from sae_lab.ops.rounded import rounded
from sae_lab.ops.sharded_selection import keep_top_of_batch, keep_top_of_rows, max_over_all, nth_largest
from sae_lab.ops.sparse import Pattern, SparseCode, split_by_rows
from sae_lab.parallel.mesh import data_axis, latent_axis, mesh_size
from sae_lab.parallel.parts import active_part, exchange
from sae_lab.runtime.threads import one_thread

Pieces: TypeAlias = Iterable[Float[Tensor, "_ f"]]
"""h as one or more pieces of consecutive rows. May be iterated several times. `[h]` is the simplest case."""

PIECE = {"cpu": 2**20, "cuda": 2**27}
"""Entries of h in memory at a time; a piece has at least 512 rows, since products of fewer rows are slower. On a CPU a
piece fits into the cache: a step at f 12288, b 4096 took 298 to 312 ms, and 314 to 336 ms with 2**24 entries."""
SAMPLE_ROWS = 64


class Preactivations:
    """Pieces of h = x W_encᵀ + b_enc, computed while iterating; in bf16 under autocast.

    With `sizes`, x and the latents are split into that many parts, and latents of part i read part i of x.
    """

    def __init__(
        self,
        x: Float[Tensor, "b n_parts*n"],
        W_enc: Float[Tensor, "f n"] | Float[Tensor, "f s n_by_s"],
        b_enc: Float[Tensor, " f"] | None,
        sizes: Sequence[int] = (),
    ):
        device = x.device.type
        lower = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if lower else x.dtype
        self.x, self.W = x.to(dtype), rounded(W_enc, dtype).flatten(1)
        self.bias = None if b_enc is None else b_enc.to(dtype)
        self.sizes = sizes

    def whole(self) -> Float[Tensor, "b f"]:
        """Compute h in one piece."""
        return linear_by_part(self.x, self.W, self.bias, self.sizes)

    def __iter__(self) -> Iterator[Float[Tensor, "_ f"]]:
        n_pieces = math.ceil(len(self.x) / max(512, PIECE[self.x.device.type] // len(self.W)))
        for x in self.x.tensor_split(max(1, n_pieces)):
            yield linear_by_part(x, self.W, self.bias, self.sizes)


def select_above(h: Pieces, threshold: Tensor, signed: bool = False) -> SparseCode:
    """Return z = relu(h) · 1[h > threshold], or z = h · 1[|h| > threshold] if `signed`."""
    bound = threshold.clamp_min(0)
    return gather_candidates(h, lambda piece, _: sortable(round_down(bound, piece.dtype)), signed).code()


def whole(h: Pieces) -> Float[Tensor, "b f"]:
    """Return h in one piece."""
    return h.whole() if isinstance(h, Preactivations) else torch.cat(list(h))


def compared(x: Tensor, signed: bool) -> Tensor:
    """Return what a rule compares: |x| if `signed`, else x."""
    return x.abs() if signed else x


def select_top_of_batch(
    h: Pieces, k: float, lower: Float[Tensor, ""] | None = None, signed: bool = False
) -> SparseCode:
    """Keep the floor(k·b) largest entries of relu(h), or of |h| if `signed`, over the whole batch.

    Only entries above a bound are gathered. The bound is estimated on the first piece such that about 1.5·k entries
    per row exceed it; if fewer than k·b entries of the batch do, h is computed again with a lower bound. With several
    processes the choice is made over the rows and latents of all ranks, and each rank keeps the entries of its own. So
    it is with the parts of a batch, each of which has a bound of its own.

    Args:
        lower: in fixed-size mode, the bound that the last batch left; updated in place. It changes the speed only.
    """
    if is_fixed_size():
        all_h = whole(h)
        lower = torch.zeros((), device=all_h.device) if lower is None else lower
        n = int(k * len(all_h) * data_axis().size)
        code = with_values_of(all_h, top_of_batch(compared(all_h, signed), min(n, all_h.numel()), lower), signed)
        return code if mesh_size() == 1 else keep_top_of_batch(code, n)[0]
    for margin in (1.5, 12, 96, math.inf):
        gather = partial(gather_candidates, h, partial(estimate_batch_bound, m=margin * k), signed)
        code = exchange(partial(keep_largest, k=k, complete=math.isinf(margin)), gather)
        if code is not None:
            break
    return code


def select_top_k(h: Pieces, k: int, signed: bool = False) -> SparseCode:
    """Keep the k largest entries of relu(h), or of |h| if `signed`, on each row."""
    if is_fixed_size():
        all_h = whole(h)
        code = top_of_rows(compared(all_h, signed), min(k, all_h.shape[1]))
        code = with_values_of(all_h, code, signed)
    else:
        found = gather_candidates(h, lambda piece, _: row_bounds(piece, min(k, piece.shape[1])), signed)
        code = found.keep(largest_of_rows(found, k)).code()
    return code if latent_axis().size == 1 else keep_top_of_rows(code, k)


def keep_largest(found: list["Entries"], k: float, complete: bool) -> Sequence[SparseCode | None]:
    """Return the codes with the k·b largest candidates of a batch of b rows; None if too few of these are known.

    Args:
        found: the candidates of each part of this rank's batch.
        complete: whether every positive entry is among them.
    """
    together = join_entries(found)
    n = int(k * together.n_rows * data_axis().size)
    if mesh_size() > 1:
        code, nth = keep_top_of_batch(together.code(), n)
        known = bool(sortable(nth) > max_over_all(together.bound))  # every rank has all of its entries above its bound
    else:
        known = (len(together.positions) if len(found) == 1 else together.n_above(together.bound)) >= n
        code = (together.keep(largest_of_batch(together.sizes(), n)) if known else together).code()
    if not known and not complete:
        return len(found) * [None]
    return split_by_rows(code, [entries.n_rows for entries in found])


def with_values_of(h: Float[Tensor, "b f"], code: SparseCode, signed: bool) -> SparseCode:
    """Return a code selected by `compared(h, signed)` with the values of h at its entries; padding stays 0."""
    if not signed or h.numel() == 0:
        return code
    rows, latents = (at.clamp_max(n - 1) for at, n in zip((code.pattern.rows, code.latents), h.shape, strict=True))
    return SparseCode(code.pattern, torch.where(code.values > 0, h[rows, latents], code.values))


class Entries(NamedTuple):
    """Entries of h: ascending positions in the flattened matrix, and values. All exceed `bound`, in `sortable` form."""

    positions: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    n_rows: int
    n_latents: int
    bound: Tensor

    def sizes(self) -> Tensor:
        """Return the absolute values in `sortable` form."""
        return sortable(self.values.abs())

    @one_thread()
    def n_above(self, bound: Tensor) -> int:
        """Return how many entries exceed a bound in `sortable` form."""
        return int((self.sizes() > bound).sum())

    def rows(self) -> Int[Tensor, " n"]:
        """Return the row of each entry."""
        return self.positions.div(self.n_latents, rounding_mode="floor")

    @one_thread()
    def keep(self, mask: Bool[Tensor, " n"]) -> "Entries":
        """Return the entries where `mask` is true."""
        kept = true_positions(mask)  # computed once for both tensors: on a GPU it makes the host wait
        return self._replace(positions=self.positions.index_select(0, kept), values=self.values.index_select(0, kept))

    @one_thread()
    def code(self) -> SparseCode:
        """Convert to a SparseCode."""
        rows = self.rows()
        row_offsets = torch.searchsorted(rows, torch.arange(self.n_rows + 1, device=rows.device))
        pattern = Pattern(row_offsets, self.positions - rows * self.n_latents, self.n_latents)
        return SparseCode(pattern, self.values)


def join_entries(parts: list[Entries]) -> Entries:
    """Join the entries of consecutive parts of a batch. All that exceed the highest of their bounds are among them."""
    if len(parts) == 1:
        return parts[0]
    n_latents = parts[0].n_latents
    starts = accumulate((part.n_rows for part in parts), initial=0)
    positions = torch.cat([part.positions + start * n_latents for part, start in zip(parts, starts, strict=False)])
    values, bounds = torch.cat([part.values for part in parts]), torch.stack([part.bound for part in parts])
    return Entries(positions, values, sum(part.n_rows for part in parts), n_latents, bounds.amax(dim=0))


def gather_candidates(h: Pieces, bound_of: Callable[[Tensor, Tensor | None], Tensor], signed: bool = False) -> Entries:
    """Gather the entries of each piece above `bound_of(piece, previous bound)`, which is non-negative and sortable.

    With `signed`, the absolute values of the piece are compared, and given to `bound_of`.
    """
    positions, values, bound, n_rows = [], [], None, 0
    for piece in h:
        sizes = compared(piece, signed)
        bound = bound_of(sizes, bound)
        with one_thread():
            place = find_above(sortable(sizes), bound)
            values.append(take(piece, place))
            positions.append(place.add_(n_rows * piece.shape[1]))
        n_rows += len(piece)
    assert bound is not None  # there is a first piece, of no rows if the batch has none
    return Entries(torch.cat(positions), torch.cat(values), n_rows, piece.shape[1], bound)


def estimate_batch_bound(piece: Float[Tensor, "n f"], bound: Tensor | None, m: float) -> Tensor:
    """Estimate a bound that about m entries per row exceed, from a sample of the first piece's rows.

    Shards have one bound, since latents of one may be larger than those of another.
    """
    if bound is not None:
        return bound
    sample = sortable(piece[:: 1 + len(piece) // SAMPLE_ROWS]).flatten()
    rank = m * len(sample) / piece.shape[1]
    if latent_axis().size > 1 and active_part() is None:  # as many rows of each rank, with all latents
        return nth_largest(sample, max(1, int(rank * data_axis().size)) if math.isfinite(rank) else sys.maxsize)
    return kth_largest(sample, max(1, int(rank))).clamp_min(0) if rank < len(sample) else sample.new_zeros(())


def row_bounds(piece: Float[Tensor, "n f"], k: int) -> Tensor:
    """Return a bound for each row that its k largest positive entries exceed, and few others.

    The row is cut into blocks. The k-th largest of the blocks' maxima is at most the k-th largest entry of the row,
    because k entries are at least as large.
    """
    n_latents = piece.shape[1]
    size = max(n for n in (1, 2, 4, 8, 16, 32) if n_latents % n == 0 and (n == 1 or n_latents >= 8 * k * n))
    maxima = sortable(piece).unflatten(1, (-1, size)).amax(dim=-1)
    return just_below(kth_largest(maxima, k).clamp_min(0)).clamp_min(0).unsqueeze(-1)  # -0.0 has nothing below


@one_thread()
def largest_of_batch(values: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Mark the k largest of at least k positive values; the first ones among ties."""
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    kth = kth_largest(values, k)
    larger, tied = values > kth, values == kth
    return larger | tied & (tied.cumsum(dim=0) <= k - larger.sum())


@one_thread()
def largest_of_rows(entries: Entries, k: int) -> Bool[Tensor, " n"]:
    """Mark the k entries of largest absolute value on each row; the first ones among ties."""
    rows, sizes = entries.rows(), entries.sizes()
    starts = torch.searchsorted(rows, torch.arange(entries.n_rows, device=rows.device))
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    table = sizes.new_zeros(entries.n_rows, max(k, int(place.max()) + 1 if len(rows) else 0))
    table[rows, place] = sizes
    kth = kth_largest(table, k).unsqueeze(-1)
    larger, tied = table > kth, table == kth
    room = k - larger.sum(dim=-1, keepdim=True)
    return (larger | tied & (tied.cumsum(dim=-1) <= room))[rows, place]


def sortable(x: Tensor) -> Tensor:
    """View bfloat16 as int16, which numpy knows and which compares faster; return other dtypes as they are.

    The bits of positive bfloat16 numbers are in the order of the numbers.
    """
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def just_below(x: Tensor) -> Tensor:
    """Return the next smaller representable number."""
    return torch.nextafter(x, torch.full_like(x, -math.inf)) if x.is_floating_point() else x - 1


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x down to `dtype`, so that `h > x` equals `h > round_down(x)` for h of that dtype."""
    y = x.to(dtype)
    return torch.where(y > x, just_below(y), y)


def find_above(h: Tensor, bound: Tensor) -> Int[Tensor, " found"]:
    """Return the ascending positions in the flattened h of the entries that exceed the bound."""
    if h.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(h.numpy() > bound.numpy()))
    return true_positions(h > bound)


def take(h: Tensor, positions: Int[Tensor, " n"]) -> Tensor:
    """Return the entries of h at these positions of the flattened h."""
    if h.device.type == "cpu":
        return torch.from_numpy(sortable(h).numpy().reshape(-1)[positions.numpy()]).view(h.dtype)
    return h.flatten()[positions]


def true_positions(mask: Bool[Tensor, "*shape"]) -> Int[Tensor, " true"]:
    """Return the ascending positions where the flattened mask is true."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(-1)


def kth_largest(h: Tensor, k: int) -> Tensor:
    """Return the k-th largest entry along the last axis."""
    if numpy_may_read(h):
        at = h.shape[-1] - k
        return torch.from_numpy(np.partition(h.numpy(), at, axis=-1)[..., at].copy())
    return h.topk(k, dim=-1, sorted=False).values.amin(dim=-1)
