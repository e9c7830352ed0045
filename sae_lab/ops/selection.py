"""Which pre-activations become active: rules that walk over h in pieces of rows and keep only what survives.

Every rule is exact, takes positive entries only and resolves ties by the lowest position: the same h gives the same
code however it is cut. On a CPU the primitives at the end are numpy's, which finds and partitions with AVX-512 where
torch takes several times longer.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.ops.matmul import linear_by_part
from sae_lab.ops.sparse import Pattern, SparseCode
from sae_lab.parallel.collectives import concatenate_ranks, min_over_ranks, world_size
from sae_lab.runtime.threads import one_thread

Pieces: TypeAlias = Iterable[Float[Tensor, "_ f"]]
"""h as pieces of consecutive rows, at least one; may be walked more than once. `[h]` is the simplest."""

PIECE = {"cpu": 2**20, "cuda": 2**27}
"""Entries of h that exist at a time, unless 512 rows are more: fewer rows would slow the product down. On a CPU they
stay in its cache: steps at f 12288, b 4096 took 298 to 312 ms, with 2**24 entries 314 to 336 ms."""
SAMPLE_ROWS = 64


class Preactivations:
    """The pieces of h = x W_encᵀ + b_enc, computed while they are walked, in bf16 under autocast.

    With `n_parts`, x and the latents are cut into as many parts: the latents of each see that part of x alone.
    """

    def __init__(
        self,
        x: Float[Tensor, "b n_parts*n"],
        W_enc: Float[Tensor, "f n"],
        b_enc: Float[Tensor, " f"] | None,
        n_parts: int = 1,
    ):
        device = x.device.type
        lower = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if lower else x.dtype
        self.x, self.W = x.to(dtype), W_enc.to(dtype)
        self.bias = None if b_enc is None else b_enc.to(dtype)
        self.n_parts = n_parts

    def __iter__(self) -> Iterator[Float[Tensor, "_ f"]]:
        n_pieces = math.ceil(len(self.x) / max(512, PIECE[self.x.device.type] // len(self.W)))
        for x in self.x.tensor_split(max(1, n_pieces)):
            yield linear_by_part(x, self.W, self.bias, self.n_parts)


def select_above(h: Pieces, threshold: Tensor) -> SparseCode:
    """z = relu(h) · 1[h > threshold]."""
    return gather_candidates(h, lambda piece, _: sortable(round_down(threshold.clamp_min(0), piece.dtype))).code()


def select_top_of_batch(h: Pieces, k: float) -> SparseCode:
    """The floor(k·b) largest entries of relu(h) over the whole batch.

    Only entries above a bound are gathered. The first piece shows the one that about 1.5·k entries a row exceed;
    should fewer than k·b exceed it in the end, h is walked again with a lower bound. Where the batch is shared out
    among processes, each keeps those of the whole batch's that lie on its rows.
    """
    for margin in (1.5, 12, 96, math.inf):
        found = gather_candidates(h, partial(bound_of_batch, m=margin * k))
        values, own = concatenate_ranks(found.values)
        n = int(k * found.n_rows * world_size())
        if len(values) >= n:
            return found.keep(largest_of_batch(values, n)[own]).code()
    return found.code()


def select_top_k(h: Pieces, k: int) -> SparseCode:
    """On each row the k largest entries of relu(h)."""
    found = gather_candidates(h, lambda piece, _: bound_of_rows(piece, k))
    return found.keep(largest_of_rows(found, k)).code()


class Entries(NamedTuple):
    """Entries of h: their positions in the flattened matrix, ascending, and their values in `sortable` form."""

    positions: Int[Tensor, " n"]
    values: Tensor
    n_rows: int
    n_latents: int
    dtype: torch.dtype

    def rows(self) -> Int[Tensor, " n"]:
        return self.positions.div(self.n_latents, rounding_mode="floor")

    @one_thread()
    def keep(self, mask: Bool[Tensor, " n"]) -> "Entries":
        kept = places(mask)  # once for both: on a GPU the host waits for it
        return self._replace(positions=self.positions.index_select(0, kept), values=self.values.index_select(0, kept))

    @one_thread()
    def code(self) -> SparseCode:
        rows = self.rows()
        row_offsets = torch.searchsorted(rows, torch.arange(self.n_rows + 1, device=rows.device))
        pattern = Pattern(row_offsets, self.positions - rows * self.n_latents, self.n_latents)
        return SparseCode(pattern, self.values.view(self.dtype))


def gather_candidates(h: Pieces, bound_of: Callable[[Tensor, Tensor | None], Tensor]) -> Entries:
    """The entries of each piece above `bound_of(piece, bound of the piece before)`, sortable and not negative."""
    positions, values, bound, n_rows = [], [], None, 0
    for piece in h:
        bound = bound_of(piece, bound)
        with one_thread():
            place, value = find_above(sortable(piece), bound)
            positions.append(place.add_(n_rows * piece.shape[1]))
            values.append(value)
        n_rows += len(piece)
    return Entries(torch.cat(positions), torch.cat(values), n_rows, piece.shape[1], piece.dtype)


def bound_of_batch(piece: Float[Tensor, "n f"], bound: Tensor | None, m: float) -> Tensor:
    """What about m entries a row exceed, judged by some rows of the first piece."""
    if bound is not None:
        return bound
    sample = sortable(piece[:: 1 + len(piece) // SAMPLE_ROWS]).flatten()
    rank = m * len(sample) / piece.shape[1]
    return min_over_ranks(
        kth_largest(sample, max(1, int(rank))).clamp_min(0) if rank < len(sample) else sample.new_zeros(())
    )


def bound_of_rows(piece: Float[Tensor, "n f"], k: int) -> Tensor:
    """For each row what its k largest positive entries exceed, and few others.

    Cut the row into blocks: the k-th largest of their maxima is at most the k-th largest entry, as k entries reach it.
    """
    n_latents = piece.shape[1]
    size = max(n for n in (1, 2, 4, 8, 16, 32) if n_latents % n == 0 and (n == 1 or n_latents >= 8 * k * n))
    maxima = sortable(piece).unflatten(1, (-1, size)).amax(dim=-1)
    return just_below(kth_largest(maxima, k)).clamp_min(0).unsqueeze(-1)


@one_thread()
def largest_of_batch(values: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Which k of at least k positive values are the largest; of equal ones the first."""
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    kth = kth_largest(values, k)
    larger, tied = values > kth, values == kth
    return larger | tied & (tied.cumsum(dim=0) <= k - larger.sum())


@one_thread()
def largest_of_rows(entries: Entries, k: int) -> Bool[Tensor, " n"]:
    """Which of some positive entries are the k largest of their row; of equal ones the first."""
    rows = entries.rows()
    starts = torch.searchsorted(rows, torch.arange(entries.n_rows, device=rows.device))
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    table = entries.values.new_zeros(entries.n_rows, max(k, int(place.max()) + 1 if len(rows) else 0))
    table[rows, place] = entries.values
    kth = kth_largest(table, k).unsqueeze(-1)
    larger, tied = table > kth, table == kth
    room = k - larger.sum(dim=-1, keepdim=True)
    return (larger | tied & (tied.cumsum(dim=-1) <= room))[rows, place]


def sortable(x: Tensor) -> Tensor:
    """x in a form that is compared fast and that numpy knows: bfloat16 as its bits, in order as far as positive."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def just_below(x: Tensor) -> Tensor:
    """The next smaller number."""
    return torch.nextafter(x, torch.full_like(x, -math.inf)) if x.is_floating_point() else x - 1


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of this dtype that does not exceed x, so that `h > x` is `h > round_down(x)`."""
    y = x.to(dtype)
    return torch.where(y > x, just_below(y), y)


def find_above(h: Tensor, bound: Tensor) -> tuple[Int[Tensor, " found"], Tensor]:
    """The entries of h that exceed the bound: their positions in the flattened h, ascending, and their values."""
    if h.device.type == "cpu":
        found = np.flatnonzero(h.numpy() > bound.numpy())
        return torch.from_numpy(found), torch.from_numpy(h.numpy().reshape(-1)[found])
    place = places(h > bound)
    return place, h.flatten()[place]


def places(mask: Bool[Tensor, "*shape"]) -> Int[Tensor, " true"]:
    """Where the flattened mask is true, ascending."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(-1)


def kth_largest(h: Tensor, k: int) -> Tensor:
    """The k-th largest entry along the last axis."""
    if h.device.type == "cpu":
        at = h.shape[-1] - k
        return torch.from_numpy(np.partition(h.numpy(), at, axis=-1)[..., at].copy())
    return h.topk(k, dim=-1, sorted=False).values.amin(dim=-1)
