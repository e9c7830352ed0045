"""adam.py's step as Triton kernels: one program per latent, its row in registers.

Bytes moved per parameter: W, m and v are read and written once, 24 B, and 2 B for a copy in bfloat16. Each entry reads
one row of `rows` besides, 4 d B, mostly from the L2 cache. Nothing else of W's size is read or written.

A latent's program sums its first PART entries. Later ones are summed before, PART at a time, by programs of their own,
so a latent that fires on every row is shared among many. Cuts, and the order of sums, are those of sparse_triton.py.
There is no autotuner: it would take the step many times, and the number of warps decides the order of a row's norm.

A row with a unit norm must be known as a whole before any of it can be updated. Rows wider than WIDEST do not fit into
a program's registers: their program walks over the columns three times (`_update_wide`).

All sums are float32. All addresses are 64 bits wide.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.ops import sparse_triton
from sae_lab.ops.sparse_triton import _add_entries, _cut

WIDEST = 8192
"""Columns in registers: W, m, v and g of 8192 columns take 64 registers in each of 512 threads."""
WALK = 1024
"""Columns at a time in wider rows."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def adam_step(
    W: Float[Tensor, "f d"],
    exp_avg: Float[Tensor, "f d"],
    exp_avg_sq: Float[Tensor, "f d"],
    offsets: Int[Tensor, " f+1"],
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    rows: Float[Tensor, "m d"],
    lr: Float[Tensor, ""],
    step: Float[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    unit_norm: bool,
    copy: Float[Tensor, "f d"] | None,
) -> None:
    """Take the step of adam.adam_step, of the gradient RowGradient(offsets, indices, weights, rows)."""
    state = [W, exp_avg, exp_avg_sq] + ([] if copy is None else [copy])
    assert all(t.shape == W.shape and t.is_contiguous() for t in state), "the kernel needs contiguous (f, d)"
    assert {W.dtype, exp_avg.dtype, exp_avg_sq.dtype, lr.dtype, step.dtype} == {torch.float32}
    f, d = W.shape
    offsets, indices, weights, rows = (t.contiguous() for t in (offsets, indices, weights, rows))
    n_cuts, common = sparse_triton.max_cuts(indices), {"PART": sparse_triton.PART}
    parts = W.new_empty((n_cuts, d))
    entries = (parts, offsets, indices, weights, rows)
    constants = (1 - betas[0], 1 - betas[1], log(betas[0]), log(betas[1]), eps, weight_decay)
    arguments = (W, exp_avg, exp_avg_sq, W if copy is None else copy, *entries, d, lr, step, *map(float, constants))
    options = common | {"DECOUPLED": decoupled, "UNIT_NORM": unit_norm, "COPY": copy is not None}
    block = triton.next_power_of_2(d) if d <= WIDEST else WALK
    options |= {"BLOCK": block, "UNROLL": 2, "num_warps": max(4, block // 512)}  # UNROLL 4 spills registers
    with torch.cuda.device_of(W):
        if n_cuts:
            _sum_later_parts[n_cuts, triton.cdiv(d, 512)](*entries, f, d, **common, UNROLL=4, BLOCK=512, num_warps=4)
        if unit_norm and d > WIDEST:
            _update_wide[(f,)](*arguments, **options)
        else:
            _update[f, triton.cdiv(d, block)](*arguments, **options)


def log(beta: float) -> float:
    """Return log β, rounded once: of a β in float32, 1 - β^t would be wrong by 1e-5 of itself for β = 0.999."""
    return math.log(beta) if beta else -math.inf


@triton.jit(do_not_specialize=["n"])
def _sum_later_parts(
    parts, offsets, indices, weights, rows, n, d, PART: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr
):
    """parts_{c-1} = sum of weights_j rows[indices_j] over the PART entries from the cut in chunk c, if there is one.

    Writes 4 d B for each full part, which is read once by the latent's program.
    """
    chunk = tl.program_id(0).to(tl.int64) + 1
    _, start, end, cut = _cut(offsets, n, chunk, PART)
    if (cut > start) & (cut < end):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        total = _add_entries(total, indices, weights, rows, cut, tl.minimum(cut + PART, end), columns, d, UNROLL)
        tl.store(parts + (chunk - 1) * d + columns, total, mask=columns < d)


@triton.jit
def _gradient(
    parts, offsets, indices, weights, rows, latent, columns, d,
    PART: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return some columns of g: the latent's first PART entries, then its later parts in order."""
    start = tl.load(offsets + latent).to(tl.int64)
    end = tl.load(offsets + latent + 1).to(tl.int64)
    g = tl.zeros((BLOCK,), tl.float32)
    g = _add_entries(g, indices, weights, rows, start, tl.minimum(start + PART, end), columns, d, UNROLL)
    for cut in range(start + PART, end, PART):  # it lies in chunk cut // PART
        g += tl.load(parts + (cut // PART - 1) * d + columns, mask=columns < d, other=0)
    return g


@triton.jit
def _adam(w, m, v, g, lr, step, gain1, gain2, log_beta1, log_beta2, eps, weight_decay, DECOUPLED: tl.constexpr):
    """Return the new (w, m, v).

    The gains are 1 - β. In β m + (1 - β) g, with β and 1 - β rounded to float32, the two weights do not add up to 1.
    """
    lr = tl.load(lr)
    step = tl.load(step)
    if DECOUPLED:
        w *= 1 - lr * weight_decay
    else:
        g += weight_decay * w
    m += gain1 * (g - m)
    v += gain2 * (g * g - v)
    denominator = tl.sqrt(v) / tl.sqrt(_one_minus_exp(step * log_beta2)) + eps
    w -= lr / _one_minus_exp(step * log_beta1) * (m / denominator)
    return w, m, v


@triton.jit
def _one_minus_exp(x):
    """Return 1 - e^x for x <= 0: near zero, where the difference would cancel, by the series of e^x."""
    near = tl.maximum(x, -0.5)
    series = near * 0
    for i in tl.static_range(10, 0, -1):
        series = (series + 1) * near / i
    return tl.where(x > -0.5, -series, 1 - tl.exp(x))


@triton.jit
def _norm(squares):
    """Return the root of the sum of squares, which divides a row: not zero."""
    return tl.maximum(tl.sqrt(tl.sum(squares, 0)), TINY)


@triton.jit
def _update(
    W, M, V, copy, parts, offsets, indices, weights, rows, d,
    lr, step, gain1, gain2, log_beta1, log_beta2, eps, weight_decay,
    DECOUPLED: tl.constexpr, UNIT_NORM: tl.constexpr, COPY: tl.constexpr,
    PART: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK columns of one latent; with UNIT_NORM these are all of them.

    Per parameter: reads 12 B (W, m, v), writes 12 B, and the copy.
    """
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = columns < d, latent * d + columns
    w = tl.load(W + at, mask=inside, other=0)
    m = tl.load(M + at, mask=inside, other=0)
    v = tl.load(V + at, mask=inside, other=0)
    g = _gradient(parts, offsets, indices, weights, rows, latent, columns, d, PART, UNROLL, BLOCK)
    if UNIT_NORM:
        g -= w * (tl.sum(g * w, 0) / tl.sum(w * w, 0))
    w, m, v = _adam(w, m, v, g, lr, step, gain1, gain2, log_beta1, log_beta2, eps, weight_decay, DECOUPLED)
    if UNIT_NORM:
        w /= _norm(tl.where(inside, w * w, 0))  # where eps is 0, w is 0 / 0 outside
    tl.store(W + at, w, mask=inside)
    tl.store(M + at, m, mask=inside)
    tl.store(V + at, v, mask=inside)
    if COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _update_wide(
    W, M, V, copy, parts, offsets, indices, weights, rows, d,
    lr, step, gain1, gain2, log_beta1, log_beta2, eps, weight_decay,
    DECOUPLED: tl.constexpr, UNIT_NORM: tl.constexpr, COPY: tl.constexpr,
    PART: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one latent with a unit norm, BLOCK columns at a time: first g·w and |w|², then Adam, then the norm.

    Per parameter: reads 20 B (W three times), writes 16 B (W twice), and the copy. Each entry's row is read twice.
    """
    latent = tl.program_id(0).to(tl.int64)
    parallel = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, d, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        w = tl.load(W + latent * d + columns, mask=columns < d, other=0)
        g = _gradient(parts, offsets, indices, weights, rows, latent, columns, d, PART, UNROLL, BLOCK)
        parallel += g * w
        squares += w * w
    along = tl.sum(parallel, 0) / tl.sum(squares, 0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, d, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside, at = columns < d, latent * d + columns
        w = tl.load(W + at, mask=inside, other=0)
        m = tl.load(M + at, mask=inside, other=0)
        v = tl.load(V + at, mask=inside, other=0)
        g = _gradient(parts, offsets, indices, weights, rows, latent, columns, d, PART, UNROLL, BLOCK) - w * along
        w, m, v = _adam(w, m, v, g, lr, step, gain1, gain2, log_beta1, log_beta2, eps, weight_decay, DECOUPLED)
        squares += tl.where(inside, w * w, 0)
        tl.store(W + at, w, mask=inside)
        tl.store(M + at, m, mask=inside)
        tl.store(V + at, v, mask=inside)
    norm = _norm(squares)
    tl.debug_barrier()  # a thread may read what another has written
    for first in range(0, d, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside, at = columns < d, latent * d + columns
        w = tl.load(W + at, mask=inside, other=0) / norm
        tl.store(W + at, w, mask=inside)
        if COPY:
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)
