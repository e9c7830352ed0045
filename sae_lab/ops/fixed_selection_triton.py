"""The rules of fixed_selection.py as Triton kernels: exact, deterministic, without a shape that depends on data.

All kernels compare keys: the bits of a positive float32 as an integer, which are in the order of the numbers; 0 stands
for every entry that is not positive, and for NaN. bfloat16 and float16 convert exactly, so one code serves all three.

Most kernels run one program per row. A first kernel lists the candidates of each row, the entries at or above a bound,
in a table of `capacity` columns; the others read a row's list, or the row of h itself where the list does not serve:
`counts[row] > capacity` says so, because there were too many candidates, or because the bound was too high. This
decides which memory is read and never the result.

Kernels of a batch, with m candidates (n plus those between the bound and the n-th value) and h of b·f entries:

| kernel | computes | bytes moved, if the bound held |
|---|---|---|
| `_list_of_batch` | candidates, and their histogram over the high 16 bits of the key | reads h once; writes 8 m |
| `_rest` | adds the entries below the bound to the histogram, if there are fewer than n candidates | reads a number |
| `_find` | the bin of the n-th largest key, and the entries above it | reads up to 256 KB |
| `_low_histogram` | histogram of the low 16 bits in that bin; not for bfloat16, whose low bits are 0 | reads 4 m |
| `_find` | the n-th largest key; not for bfloat16 | reads up to 512 KB |
| `_tally` | of each row, the entries above the n-th largest key and those equal to it | reads 4 m |
| `_offsets` | row_offsets, with room for the first of the equal ones | 16 b |
| `_gather` | latents and values | reads 8 m; writes 10 n or 12 n |

With the one that sets the histograms to 0, these are 7 launches for bfloat16 and 9 otherwise. Of rows there are 4:
`_list_of_rows` (reads h twice), `_kth_of_row`, `_offsets`, `_gather`. Nothing here has been timed on a GPU.

Atomic additions count integers, so their order changes nothing. Addresses and counts over a batch are 64 bits wide.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.sparse import Pattern, SparseCode

INFINITY = tl.constexpr(0x7F800000)
"""The largest key: the bits of infinity. Above it are NaNs."""
BLOCK = 2048
"""Entries of a row of h that a program reads at a time."""
LANES = 1024
"""Fewest groups into which `_list_of_rows` cuts a row."""
LIST_BLOCK = 256
"""Entries of a row's list of candidates that a program reads at a time; most lists are shorter."""
BINS_BLOCK = 4096
"""Bins of a histogram that `_find` reads at a time."""
ROWS_BLOCK = 4096
"""Rows that `_offsets` reads at a time."""
MAX_REST = 1024
"""Programs of `_rest`, few because it mostly has nothing to do."""
ROOM = 8
"""Columns of the table for each of the k entries of a row, on average."""


@torch.no_grad()
def top_of_batch(h: Float[Tensor, "b f"], n: int, lower: Float[Tensor, ""], lowered: float) -> SparseCode:
    """Compute fixed_selection.top_of_batch for n > 0 and a float32, bfloat16 or float16 h with at least one entry.

    The guess for the next batch is the n-th largest value times `lowered`.
    """
    assert (lower.dtype, lower.ndim, lower.device) == (torch.float32, 0, h.device)
    h = h.contiguous()
    bits, (b, f) = _bits(h), h.shape
    high, low = 2**15, 0 if h.dtype == torch.bfloat16 else 2**16
    zeros = torch.zeros(high + low + 3, dtype=torch.int64, device=h.device)  # one, because each costs a launch
    histogram, low_histogram, total, nth, n_larger = zeros.split([high, low, 1, 1, 1])
    keys, latents, counts = _table(h, triton.cdiv(n, b))
    larger, tied = counts.new_empty((2, b))
    size, block = {"f": f, "capacity": keys.shape[1]}, _block(f)
    with torch.cuda.device_of(h):
        _list_of_batch[(b,)](bits, lower, keys, latents, counts, histogram, total, **size, BLOCK=block, num_warps=1)
        _rest[(min(b, MAX_REST),)](bits, lower, counts, histogram, total, b, n, **size, BLOCK=block, num_warps=2)
        find = {"n": n, "LOWERED": lowered, "BLOCK": BINS_BLOCK, "num_warps": 16}
        _find[(1,)](histogram, nth, n_larger, lower, N_BINS=high, SHIFT=16, LAST=not low, **find)
        if low:
            _low_histogram[(b,)](bits, keys, counts, low_histogram, nth, **size, BLOCK=LIST_BLOCK, num_warps=1)
            _find[(1,)](low_histogram, nth, n_larger, lower, N_BINS=low, SHIFT=0, LAST=True, **find)
        _tally[(b,)](bits, keys, counts, nth, larger, tied, **size, BLOCK=LIST_BLOCK, num_warps=1)
        return _kept(h, n, (keys, latents, counts), nth, larger, tied, n_larger)


@torch.no_grad()
def top_of_rows(h: Float[Tensor, "b f"], k: int) -> SparseCode:
    """Compute fixed_selection.top_of_rows for k > 0 and a float32, bfloat16 or float16 h with at least one entry."""
    h, n, k = h.contiguous(), k * len(h), min(k, h.shape[1])
    bits, (b, f) = _bits(h), h.shape
    lanes = max(LANES, triton.next_power_of_2(min(ROOM * k, f)))
    keys, latents, counts = _table(h, k)
    bounds, tops, nth, larger, tied = counts.new_empty((5, b))
    size = {"f": f, "capacity": keys.shape[1]}
    shift = 16 if h.dtype == torch.bfloat16 else 0
    with torch.cuda.device_of(h):
        _list_of_rows[(b,)](
            bits, keys, latents, counts, bounds, tops, k, **size,
            SHIFT=shift, LANES=lanes, BLOCK=_block(f), num_warps=min(32, max(1, lanes // 512)),
        )  # fmt: skip
        _kth_of_row[(b,)](
            bits, keys, counts, bounds, tops, nth, larger, tied, k, **size, SHIFT=shift, BLOCK=LIST_BLOCK, num_warps=1
        )  # fmt: skip
        return _kept(h, n, (keys, latents, counts), nth, larger, tied, None)


def _block(f: int) -> int:
    """Return how many entries of a row to read at a time.

    If f is not a multiple of 16, each entry is loaded by itself, and BLOCK of them do not fit into registers.
    """
    return BLOCK if f % 16 == 0 else BLOCK // 2


def _bits(x: Tensor) -> Tensor:
    """View float32 and bfloat16 as integers: the kernels then move their bits without arithmetic."""
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.float16}
    return x.detach().view(views[x.dtype])


def _table(h: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (keys, latents, counts) for the lists of candidates, not initialised."""
    capacity = min(h.shape[1], triton.next_power_of_2(ROOM * k))
    keys, latents = torch.empty((2, len(h), capacity), dtype=torch.int32, device=h.device)
    return keys, latents, keys.new_empty(len(h))


def _kept(
    h: Tensor, n: int, table: Sequence[Tensor], nth: Tensor, larger: Tensor, tied: Tensor, n_larger: Tensor | None
) -> SparseCode:
    """Return the entries to keep as a code. nth is one key for all rows; without n_larger, one for each row."""
    b, f = h.shape
    row_offsets, latents = (torch.empty(size, dtype=torch.int64, device=h.device) for size in (b + 1, n))
    code = SparseCode(Pattern(row_offsets, latents, f, padded=True), h.new_empty(n))
    _offsets[(1,)](row_offsets, larger, tied, n_larger, b, n, BLOCK=ROWS_BLOCK, num_warps=16)
    _gather[(b,)](
        _bits(h), *table, nth, larger, row_offsets, latents, _bits(code.values), b, n, f, table[0].shape[1],
        NTH_STRIDE=int(n_larger is None), BLOCK=LIST_BLOCK, num_warps=1,
    )  # fmt: skip
    return code


@triton.jit
def _key(x):
    """Return the key of each entry of a block of `_bits`."""
    if x.dtype == tl.int16:
        x = x.to(tl.int32) << 16
    elif x.dtype == tl.float16:
        x = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where((x > 0) & (x <= INFINITY), x, 0)


@triton.jit
def _value(key, dtype: tl.constexpr):
    """Return the entries of `_bits` that have these keys."""
    if dtype == tl.int16:
        key = (key >> 16).to(tl.int16)
    elif dtype == tl.float16:
        key = key.to(tl.float32, bitcast=True).to(tl.float16)
    return key


@triton.jit
def _key_at(h, keys, row, at, in_list, length, f, capacity):
    """Load keys from a row's list of candidates or from the row of h; 0 from `length` on."""
    if in_list:
        key = tl.load(keys + row * capacity + at, mask=at < length, other=0)
    else:
        key = _key(tl.load(h + row * f + at, mask=at < length, other=0))
    return key


@triton.jit
def _source(counts, row, f, capacity):
    """Return (whether the row's list of candidates serves, number of entries to read)."""
    count = tl.load(counts + row)
    in_list = count <= capacity
    return in_list, tl.where(in_list, count, f)


@triton.jit
def _bound(lower):
    """Return the smallest key of a candidate. A guess that is negative lets all positive entries through."""
    return tl.maximum(tl.load(lower).to(tl.int32, bitcast=True), 1)


@triton.jit
def _count_bits(x):
    """Count the bits that are set in each int32."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _list(h, keys, latents, counts, histogram, row, bound, f, capacity, BLOCK: tl.constexpr):
    """List the row's candidates by latent, up to the table's capacity, and return the number of all of them.

    32 entries become one word, with a bit for each candidate. Sums and stores then handle a 32nd of the elements.
    """
    word, bit = tl.arange(0, BLOCK // 32), tl.arange(0, 32)[None, :]
    count = 0
    for start in range(0, f, BLOCK):
        at = start + 32 * word[:, None] + bit
        above = _key(tl.load(h + row * f + at, mask=at < f, other=0)) >= bound
        left = tl.sum(tl.where(above, 1 << bit, 0), 1)
        n = _count_bits(left)
        place = count + tl.cumsum(n, 0) - n
        count += tl.sum(n, 0)
        while tl.max((left != 0).to(tl.int32), 0) > 0:
            latent = start + 32 * word + _count_bits((left & -left) - 1)  # of each word's lowest bit
            key = _key(tl.load(h + row * f + latent, mask=left != 0, other=0))
            fits = (left != 0) & (place < capacity)
            tl.store(keys + row * capacity + place, key, mask=fits)
            tl.store(latents + row * capacity + place, latent, mask=fits)
            if histogram is not None:
                one = tl.full((BLOCK // 32,), 1, tl.int64)
                tl.atomic_add(histogram + (key >> 16), one, mask=left != 0, sem="relaxed")
            place += 1
            left &= left - 1
    tl.store(counts + row, count)
    return count


@triton.jit
def _list_of_batch(h, lower, keys, latents, counts, histogram, total, f, capacity, BLOCK: tl.constexpr):
    """List the candidates of a row: keys and latents (b, capacity), counts (b). Add them to the histogram."""
    row = tl.program_id(0).to(tl.int64)
    count = _list(h, keys, latents, counts, histogram, row, _bound(lower), f, capacity, BLOCK)
    tl.atomic_add(total, count.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["b", "n"])
def _rest(h, lower, counts, histogram, total, b, n, f, capacity, BLOCK: tl.constexpr):
    """If the bound let too few through: add the entries below it to the histogram, and discard the lists."""
    bound = _bound(lower)
    if (tl.load(total) < n) & (bound > 1):
        for row in range(tl.program_id(0).to(tl.int64), b, tl.num_programs(0)):
            for start in range(0, f, BLOCK):
                at = start + tl.arange(0, BLOCK)
                key = _key(tl.load(h + row * f + at, mask=at < f, other=0))
                below = (key > 0) & (key < bound)
                tl.atomic_add(histogram + (key >> 16), tl.full((BLOCK,), 1, tl.int64), mask=below, sem="relaxed")
            tl.store(counts + row, capacity + 1)


@triton.jit(do_not_specialize=["n"])
def _find(
    histogram, nth, n_larger, lower, n,
    N_BINS: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, LOWERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the bin of the n-th largest key, from the top: the largest one with n entries in it and above.

    Bin 0 is taken if there are fewer. The first call finds the key's high bits and the second the low ones; the last
    sets the next batch's bound.
    """
    larger = tl.load(n_larger)
    first = N_BINS - BLOCK
    in_block = tl.load(histogram + first + tl.arange(0, BLOCK))
    while (first > 0) & (larger + tl.sum(in_block, 0) < n):
        larger += tl.sum(in_block, 0)
        first -= BLOCK
        in_block = tl.load(histogram + first + tl.arange(0, BLOCK))
    bins = first + tl.arange(0, BLOCK)
    at_or_above = larger + tl.sum(in_block, 0) - tl.cumsum(in_block, 0) + in_block
    digit = tl.max(tl.where(at_or_above >= n, bins, 0), 0)
    key = tl.load(nth) + (digit << SHIFT)
    tl.store(nth, key)
    tl.store(n_larger, larger + tl.sum(tl.where(bins > digit, in_block, 0), 0))
    if LAST:
        tl.store(lower, key.to(tl.int32).to(tl.float32, bitcast=True) * LOWERED)


@triton.jit
def _low_histogram(h, keys, counts, histogram, nth, f, capacity, BLOCK: tl.constexpr):
    """Add the low 16 bits of a row's entries whose high bits are those of the n-th largest key to the histogram."""
    row = tl.program_id(0).to(tl.int64)
    in_list, length = _source(counts, row, f, capacity)
    high = tl.load(nth).to(tl.int32)
    for start in range(0, length, BLOCK):
        key = _key_at(h, keys, row, start + tl.arange(0, BLOCK), in_list, length, f, capacity)
        here = (key > 0) & (key >> 16 == high >> 16)
        tl.atomic_add(histogram + (key & 0xFFFF), tl.full((BLOCK,), 1, tl.int64), mask=here, sem="relaxed")


@triton.jit
def _at_least(h, keys, row, bound, in_list, length, f, capacity, BLOCK: tl.constexpr):
    """Count the row's entries with this key or a larger one."""
    count = 0
    for start in range(0, length, BLOCK):
        key = _key_at(h, keys, row, start + tl.arange(0, BLOCK), in_list, length, f, capacity)
        count += tl.sum((key >= bound).to(tl.int32), 0)
    return count


@triton.jit
def _tally(h, keys, counts, nth, larger, tied, f, capacity, BLOCK: tl.constexpr):
    """Count the row's entries with keys above the n-th largest and equal to it."""
    row = tl.program_id(0).to(tl.int64)
    in_list, length = _source(counts, row, f, capacity)
    kth = tl.load(nth).to(tl.int32)
    above = _at_least(h, keys, row, kth + 1, in_list, length, f, capacity, BLOCK)
    tl.store(larger + row, above)
    tl.store(tied + row, _at_least(h, keys, row, tl.maximum(kth, 1), in_list, length, f, capacity, BLOCK) - above)


@triton.jit(do_not_specialize=["k"])
def _list_of_rows(
    h, keys, latents, counts, bounds, tops, k, f, capacity,
    SHIFT: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the entries of a row at or above a bound that at least k entries reach if k are positive, and few others.

    The row is cut into LANES >= k groups. The k-th largest of the groups' maxima is such a bound, as k entries are at
    least as large. It is found by bisection.
    """
    row = tl.program_id(0).to(tl.int64)
    maxima = tl.zeros((LANES,), tl.int32)
    for start in range(0, f, LANES):
        at = start + tl.arange(0, LANES)
        maxima = tl.maximum(maxima, _key(tl.load(h + row * f + at, mask=at < f, other=0)))
    top = tl.max(maxima, 0)
    low, high = top * 0, (top >> SHIFT) + 1
    while high - low > 1:  # at least k maxima reach low, fewer than k reach high
        middle = low + (high - low) // 2
        enough = tl.sum((maxima >= (middle << SHIFT)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    bound = tl.maximum(low << SHIFT, 1)
    _list(h, keys, latents, counts, None, row, bound, f, capacity, BLOCK)
    tl.store(bounds + row, bound)
    tl.store(tops + row, top)


@triton.jit(do_not_specialize=["k"])
def _kth_of_row(
    h, keys, counts, bounds, tops, nth, larger, tied, k, f, capacity, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Find the k-th largest key of a row by bisection (0 if fewer are positive); count larger ones and ties to keep."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    in_list, length = _source(counts, row, f, capacity)
    low, high = tl.load(bounds + row) >> SHIFT, (tl.load(tops + row) >> SHIFT) + 1
    low = tl.where(count < k, high, low)
    while high - low > 1:  # at least k entries reach low, fewer than k reach high
        middle = low + (high - low) // 2
        enough = _at_least(h, keys, row, middle << SHIFT, in_list, length, f, capacity, BLOCK) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    kth = tl.where(count < k, 0, low << SHIFT)
    above = _at_least(h, keys, row, kth + 1, in_list, length, f, capacity, BLOCK)
    tl.store(nth + row, kth)
    tl.store(larger + row, above)
    tl.store(tied + row, tl.minimum(count, k) - above)


@triton.jit(do_not_specialize=["b", "n"])
def _offsets(row_offsets, larger, tied, n_larger, b, n, BLOCK: tl.constexpr):
    """Sum the entries kept on each row: the larger ones, and the tied ones as long as there is room for them.

    `n_larger` is the sum of larger, or None if all tied ones are kept.
    """
    room = tl.full((), 0, tl.int64) + n
    if n_larger is not None:
        room -= tl.load(n_larger)
    end, n_tied = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    tl.store(row_offsets, end)
    for start in range(0, b, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        ties = tl.load(tied + rows, mask=rows < b, other=0).to(tl.int64)
        left = tl.maximum(room - (n_tied + tl.cumsum(ties, 0) - ties), 0)
        kept = tl.load(larger + rows, mask=rows < b, other=0) + tl.minimum(ties, left)
        tl.store(row_offsets + 1 + rows, end + tl.cumsum(kept, 0), mask=rows < b)
        end += tl.sum(kept, 0)
        n_tied += tl.sum(ties, 0)


@triton.jit(do_not_specialize=["b", "n"])
def _gather(
    h, keys, latents, counts, nth, larger, row_offsets, out_latents, out_values, b, n, f, capacity,
    NTH_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row's entries above the n-th largest key, the first ones equal to it, and a share of the padding."""
    row = tl.program_id(0).to(tl.int64)
    in_list, length = _source(counts, row, f, capacity)
    kth = tl.load(nth + row * NTH_STRIDE).to(tl.int32)
    place = tl.load(row_offsets + row)
    room = (tl.load(row_offsets + row + 1) - place - tl.load(larger + row)).to(tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = _key_at(h, keys, row, at, in_list, length, f, capacity)
        latent = at
        if in_list:
            latent = tl.load(latents + row * capacity + at, mask=at < length, other=0)
        tied = ((key > 0) & (key == kth)).to(tl.int32)
        kept = (key > kth) | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
        to = place + tl.cumsum(kept.to(tl.int64), 0) - 1
        tl.store(out_latents + to, latent.to(tl.int64), mask=kept)
        tl.store(out_values + to, _value(key, out_values.dtype.element_ty), mask=kept)
        place += tl.sum(kept.to(tl.int64), 0)
        room -= tl.sum(tied, 0)
    stop = tl.minimum((row + 1) * ((n + b - 1) // b), n)  # of the row's share of the n entries, for padding
    for start in range(tl.maximum(row * ((n + b - 1) // b), tl.load(row_offsets + b)), stop, BLOCK):
        to = start + tl.arange(0, BLOCK)
        tl.store(out_latents + to, tl.full((BLOCK,), 0, tl.int64) + f, mask=to < stop)
        tl.store(out_values + to, tl.zeros((BLOCK,), out_values.dtype.element_ty), mask=to < stop)
