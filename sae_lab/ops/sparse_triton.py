"""The two primitives of sparse.py as Triton kernels: weighted sums of rows, and dot products with rows.

The entries of one output row are a segment. A segment is cut into parts of PART entries, and each program of a kernel
computes one part, so a latent that fires on every row is shared among many programs. Sums have a fixed order: the
entries of a part in order, then the parts in order. There are no atomics, and all configurations of the autotuner keep
this order, so results are equal to the bit in every run and for every configuration.

Programs 0 to n - 1 compute the first parts of the n segments. Later parts need no table: a chunk of PART consecutive
entries, counted from entry 0, contains at most one cut, so program n - 1 + c searches chunk c for a cut. Most find
none.

Sums are float32, or float64 if the rows are. All addresses are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PART = 128
"""Not tuned, because it decides the order of sums. Long enough to make cuts rare, short compared with all the work."""


def weighted_sums(
    offsets: Int[Tensor, " n+1"],
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    rows: Float[Tensor, "m d"],
    padded: bool = False,
) -> Float[Tensor, "n d"]:
    """Compute out_i = sum_{offsets_i <= j < offsets_{i+1}} weights_j rows[indices_j], in the dtype of the rows.

    Args:
        padded: whether there may be entries after offsets[-1]. No program reads them.
    """
    n, d, n_cuts = len(offsets) - 1, rows.shape[1], max_cuts(indices)
    out = rows.new_empty((n, d), dtype=accumulator(rows.dtype))
    parts = out.new_empty((n_cuts, d))
    with torch.cuda.device_of(rows):
        _sums[lambda meta: (n + n_cuts, triton.cdiv(d, meta["BLOCK"]))](
            out, parts, offsets, indices.contiguous(), weights.contiguous(), rows.contiguous(),
            n, d, entries_per_segment(indices, n), PART=PART,
        )  # fmt: skip
        if n_cuts:
            _add_parts[n_cuts, triton.cdiv(d, 512)](out, parts, offsets, n, d, PART=PART, BLOCK=512, num_warps=4)
    return out.to(rows.dtype)


def dot_products(
    offsets: Int[Tensor, " n+1"],
    indices: Int[Tensor, " nnz"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "m d"],
    padded: bool = False,
) -> Float[Tensor, " nnz"]:
    """Compute out_j = left_i · right[indices_j] for offsets_i <= j < offsets_{i+1}, in the dtype of the left rows.

    Args:
        padded: whether there may be entries after offsets[-1]. Their product is zero.
    """
    n, d = left.shape
    out = left.new_zeros(len(indices)) if padded else left.new_empty(len(indices))
    with torch.cuda.device_of(left):
        _dots[(n + max_cuts(indices),)](
            out, offsets, indices.contiguous(), left.contiguous(), right.contiguous(),
            n, d, entries_per_segment(indices, n), PART=PART,
        )  # fmt: skip
    return out


def max_cuts(indices: Int[Tensor, " nnz"]) -> int:
    """Return the largest possible number of cuts: one in each chunk of PART entries but the first."""
    return max(0, triton.cdiv(len(indices), PART) - 1)


def entries_per_segment(indices: Int[Tensor, " nnz"], n: int) -> int:
    """Return the autotuner's key for a size: the bits of the mean number of entries, equal for all batches of a run."""
    return (len(indices) // max(1, n)).bit_length()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def _cut(offsets, n, chunk, PART: tl.constexpr):
    """Return (segment, start, end, cut) for the segment that contains the chunk's first entry.

    The chunk has a cut only if start < cut < end.
    """
    entry = chunk * PART
    segment = chunk * 0
    above = segment + n
    while above - segment > 1:  # offsets[segment] <= entry < offsets[above]
        middle = (segment + above) // 2
        right = tl.load(offsets + middle) <= entry
        segment = tl.where(right, middle, segment)
        above = tl.where(right, above, middle)
    start = tl.load(offsets + segment)
    return segment, start, tl.load(offsets + segment + 1), start + (entry - start + PART - 1) // PART * PART


@triton.jit
def _part(offsets, n, PART: tl.constexpr):
    """Return (segment, first entry, last entry + 1) of this program's part."""
    program = tl.program_id(0).to(tl.int64)
    if program < n:
        segment = program
        first = tl.load(offsets + segment)
        end = tl.load(offsets + segment + 1)
    else:
        segment, start, end, first = _cut(offsets, n, program - n + 1, PART)
        first = tl.where(first > start, first, end)
    return segment, first, tl.minimum(first + PART, end)


@triton.jit
def _add_entries(total, indices, weights, rows, first, stop, columns, d, UNROLL: tl.constexpr):
    """Add weights_j rows[indices_j] to total, for first <= j < stop in this order."""
    inside = columns < d
    for entry in range(first, stop, UNROLL):
        for i in tl.static_range(UNROLL):
            here = entry + i < stop
            row = tl.load(indices + entry + i, mask=here, other=0).to(tl.int64)
            weight = tl.load(weights + entry + i, mask=here, other=0).to(total.dtype)
            piece = tl.load(rows + row * d + columns, mask=inside & here, other=0)
            total += weight * piece.to(total.dtype)
    return total


SUMS = [
    triton.Config({"BLOCK": block, "UNROLL": unroll}, num_warps=num_warps, num_stages=1)
    for block, num_warps in ((128, 1), (256, 1), (512, 4), (1024, 4))
    for unroll in (4, 8)
]


@triton.autotune(SUMS, key=["d", "per_segment"])
@triton.jit(do_not_specialize=["n", "per_segment"])
def _sums(
    out, parts, offsets, indices, weights, rows, n, d, per_segment,
    PART: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum each element of a row in one thread, entry by entry, so that BLOCK and UNROLL do not change any bit."""
    segment, first, stop = _part(offsets, n, PART)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    total = _add_entries(total, indices, weights, rows, first, stop, columns, d, UNROLL)
    program = tl.program_id(0).to(tl.int64)
    if program < n:
        tl.store(out + segment * d + columns, total, mask=inside)
    elif first < stop:
        tl.store(parts + (program - n) * d + columns, total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _add_parts(out, parts, offsets, n, d, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Add the later parts of each cut segment to its sum, in the program of the segment's first cut."""
    chunk = tl.program_id(0).to(tl.int64) + 1
    segment, start, end, cut = _cut(offsets, n, chunk, PART)
    if (cut == start + PART) & (cut < end):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < d
        total = tl.load(out + segment * d + columns, mask=inside)
        for part in range(chunk - 1, chunk - 1 + (end - cut + PART - 1) // PART):
            total += tl.load(parts + part * d + columns, mask=inside)
        tl.store(out + segment * d + columns, total, mask=inside)


DOTS = [triton.Config({"ENTRIES": entries}, num_warps=1, num_stages=1) for entries in (2, 4, 8)]


@triton.autotune(DOTS, key=["d", "per_segment"])
@triton.jit(do_not_specialize=["n", "per_segment"])
def _dots(
    out, offsets, indices, left, right, n, d, per_segment,
    PART: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr = 256,
):  # fmt: skip
    """Multiply, then reduce over the lanes of one warp. BLOCK decides the order of that sum and is not tuned."""
    segment, first, stop = _part(offsets, n, PART)
    accumulator = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    for entry in range(first, stop, ENTRIES):
        entries = entry + tl.arange(0, ENTRIES)
        here = (entries < stop)[:, None]
        rows = tl.load(indices + entries[:, None], mask=here, other=0) * d
        products = tl.zeros((ENTRIES, BLOCK), accumulator)
        for column in range(0, d, BLOCK):
            columns = (column + tl.arange(0, BLOCK))[None, :]
            a = tl.load(left + segment * d + columns, mask=columns < d, other=0)
            b = tl.load(right + rows + columns, mask=here & (columns < d), other=0)
            products += a.to(accumulator) * b.to(accumulator)
        tl.store(out + entries, tl.sum(products, axis=1), mask=entries < stop)
