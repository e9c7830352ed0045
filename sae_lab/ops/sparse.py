"""Sparse codes, and the products that touch only their active entries.

A training step of a top-k SAE needs one dense product, the encoder's (selection.py keeps its largest entries). All
other products are here. An active entry e, on row r and latent c, contributes to

    x_hat_r  = sum_{e on r} z_e W_dec_c + b_dec          z_e       = (x_r - b_dec) · W_enc_c [+ b_enc_c]
    dz_e     = dx_hat_r · W_dec_c                        dW_enc_c  = sum_{e on c} dz_e (x_r - b_dec)
    dW_dec_c = sum_{e on c} z_e dx_hat_r                 db_enc_c  = sum_{e on c} dz_e
    db_dec   = sum_r dx_hat_r - sum_c db_enc_c W_enc_c   dx_r      = sum_{e on r} dz_e W_enc_c

All of these are built from two primitives: `weighted_sums` of rows, over the entries of a row or of a latent, and
`dot_products`, one per entry. On a GPU they are Triton kernels (sparse_triton.py) if Triton is installed, otherwise
torch's sparse kernels. There are no atomic additions: two runs are equal to the bit.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lab.ops.fixed_size import numpy_may_read
from sae_lab.parallel.mesh import latent_axis
from sae_lab.parallel.shards import min_over_shards, sum_over_shards
from sae_lab.runtime.threads import one_thread

warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are implicitly)")

HAS_TRITON = find_spec("triton") is not None


class ByLatent(NamedTuple):
    """Entries of a pattern sorted by latent, then by row: latent c has the entries offsets[c] : offsets[c + 1]."""

    order: Int[Tensor, " nnz"]
    """Position of each entry in the pattern."""
    rows: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " f+1"]

    @one_thread()
    def sort(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """Reorder values from the pattern's order to this one."""
        return values[self.order]

    @one_thread()
    def unsort(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """Reorder values from this order to the pattern's."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


@dataclass(frozen=True, eq=False)
class Pattern:
    """Sparsity pattern in CSR form: row r has the latents latents[row_offsets[r] : row_offsets[r + 1]], ascending.

    A padded pattern has a fixed number of entries, whatever the data (see ops/fixed_size.py). The entries after
    row_offsets[-1] belong to no row: their latent is n_latents, their row is b and their value is zero.
    """

    row_offsets: Int[Tensor, " b+1"]
    latents: Int[Tensor, " nnz"]
    n_latents: int
    padded: bool = False

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """Row of each entry."""
        if self.padded:
            return segment_of_entry(self.row_offsets, len(self.latents))
        n_rows = len(self.row_offsets) - 1
        rows = torch.arange(n_rows, device=self.latents.device)
        return rows.repeat_interleave(self.row_offsets.diff(), output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> ByLatent:
        """The entries sorted by latent; padding comes last."""
        with one_thread():
            order = stable_argsort(self.latents)
            offsets = F.pad(self.fire_counts.cumsum(0), (1, 0))
            return ByLatent(order, self.rows[order], offsets)

    @cached_property
    def fire_counts(self) -> Int[Tensor, " f"]:
        """Number of entries of each latent."""
        counts = self.latents.new_zeros(self.n_latents + self.padded)
        # not bincount: on a GPU it makes the host wait
        return counts.scatter_add_(0, self.latents, torch.ones_like(self.latents))[: self.n_latents]


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Code of shape (b, f) stored as its active (non-zero) entries. Gradients flow through `values`."""

    pattern: Pattern
    values: Float[Tensor, " nnz"]

    @property
    def row_offsets(self) -> Int[Tensor, " b+1"]:
        return self.pattern.row_offsets

    @property
    def latents(self) -> Int[Tensor, " nnz"]:
        return self.pattern.latents

    @property
    def n_latents(self) -> int:
        return self.pattern.n_latents

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.row_offsets) - 1, self.n_latents))

    def to_dense(self) -> Float[Tensor, "b f"]:
        """Return the code as a dense matrix, with gradients to `values`."""
        b, f = self.shape
        whole = self.values.new_zeros(b + self.pattern.padded, f + self.pattern.padded)
        return whole.index_put((self.pattern.rows, self.latents), self.values)[:b, :f]


Code: TypeAlias = SparseCode | Float[Tensor, "b f"]


def l0_per_row(code: Code) -> Int[Tensor, " b"]:
    """Count the active (non-zero) latents on each row."""
    return sum_over_shards(code.row_offsets.diff() if isinstance(code, SparseCode) else (code != 0).sum(dim=-1))


def fire_counts(code: Code) -> Int[Tensor, " f"]:
    """Count the rows on which each latent is active."""
    return code.pattern.fire_counts if isinstance(code, SparseCode) else (code != 0).sum(dim=0)


def fired_latents(code: Code) -> Bool[Tensor, " f"]:
    """Mark the latents that are active on at least one row."""
    return fire_counts(code) > 0 if isinstance(code, SparseCode) else (code != 0).any(dim=0)


def smallest_active(code: Code) -> Tensor:
    """Return min{|z_ij| : z_ij != 0}, a scalar; infinity if no latent is active."""
    sizes = (code.values if isinstance(code, SparseCode) else code).abs()
    least = sizes.masked_fill(sizes == 0, torch.inf).amin() if sizes.numel() else sizes.new_full((), torch.inf)
    return min_over_shards(least)


def split_by_group(code: Code, sizes: Sequence[int]) -> list[Code]:
    """Split a code into consecutive groups of latents. Latents are numbered from 0 in each group."""
    if not isinstance(code, SparseCode):
        return list(code.split(list(sizes), dim=-1))
    return [
        keep_entries(code, (code.latents >= stop - size) & (code.latents < stop), stop - size, size)
        for stop, size in zip(accumulate(sizes), sizes, strict=True)
    ]


def split_by_rows(code: SparseCode, sizes: Sequence[int]) -> list[SparseCode]:
    """Split an unpadded code into consecutive groups of rows. One group is the code itself."""
    if len(sizes) == 1:
        return [code]
    pattern, parts = code.pattern, []
    for start, stop in pairwise(accumulate(sizes, initial=0)):
        offsets = pattern.row_offsets[start : stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        part = Pattern(offsets - offsets[0], pattern.latents[entries], pattern.n_latents)
        parts.append(SparseCode(part, code.values[entries]))
    return parts


def keep_entries(
    code: SparseCode, kept: Bool[Tensor, " nnz"], first: int = 0, n_latents: int | None = None
) -> SparseCode:
    """Return a code with only the entries that are kept, padded to as many entries if it was padded.

    Args:
        first: the latent that becomes number 0.
        n_latents: how many latents the result has; None: as many as before.
    """
    n, pattern = len(kept), code.pattern
    n_latents = pattern.n_latents if n_latents is None else n_latents
    if not pattern.padded:
        entries = kept.nonzero().squeeze(-1)
        row_offsets = torch.searchsorted(entries, pattern.row_offsets)
        return SparseCode(Pattern(row_offsets, pattern.latents[entries] - first, n_latents), code.values[entries])
    counts = F.pad(kept.cumsum(0), (1, 0))
    place = torch.where(kept, counts[1:] - 1, n)  # the others share a place that is cut off
    latents = pattern.latents.new_full((n + 1,), n_latents).scatter(0, place, pattern.latents - first)[:n]
    values = code.values.new_zeros(n + 1).scatter(0, place, code.values)[:n]
    return SparseCode(Pattern(counts[pattern.row_offsets], latents, n_latents, padded=True), values)


def keep_first_latents(code: Code, n: int) -> Code:
    """Set all latents but the first n to zero."""
    if isinstance(code, SparseCode) and code.pattern.padded:
        return keep_entries(code, code.latents < n, 0, code.n_latents)
    first = split_by_group(code, [n, code.shape[1] - n])[0]
    if isinstance(first, SparseCode):
        return SparseCode(replace(first.pattern, n_latents=code.shape[1]), first.values)
    return F.pad(first, (0, code.shape[1] - n))


def decode(
    code: Code, W_dec: Float[Tensor, "f s d"], b_dec: Float[Tensor, "s d"] | Float[Tensor, "b s d"]
) -> Float[Tensor, "b s d"]:
    """Compute x_hat = z W_dec + b_dec, with gradients for the code's values, W_dec and b_dec.

    Args:
        b_dec: one bias for all rows, or one per row.
    """
    if latent_axis().size > 1:
        return sum_over_shards(_decode(code, W_dec, torch.zeros_like(b_dec))) + b_dec
    return _decode(code, W_dec, b_dec)


def _decode(code: Code, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    if isinstance(code, SparseCode):
        return _Decode.apply(code.values, W_dec, b_dec, code.pattern)
    return (code @ W_dec.flatten(1)).unflatten(-1, W_dec.shape[1:]) + b_dec


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, W_dec: Tensor, b_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(z, W_dec)
        ctx.pattern, ctx.bias_by_row, ctx.factors = pattern, b_dec.ndim > 2, getattr(W_dec, "factors", None)
        x_hat = weighted_sums(pattern.row_offsets, pattern.latents, z, W_dec.flatten(1), pattern.padded)
        return x_hat.add_(b_dec.flatten(-2)).unflatten(-1, W_dec.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, W_dec = ctx.saved_tensors
        needs_z, needs_W, needs_b, _ = ctx.needs_input_grad
        entries, padded = ctx.pattern.by_latent, ctx.pattern.padded
        grad_z = grad_W = None
        g = grad.flatten(1).contiguous()
        if needs_z:  # sorted by latent: the rows of grad stay in cache, and each row of W_dec is read once
            grad_z = entries.unsort(dot_products(entries.offsets, entries.rows, W_dec.flatten(1), g, padded))
        if needs_W:
            grad_W = gradient_or_factors(
                ctx.factors, RowGradient(entries.offsets, entries.rows, entries.sort(z), g, padded)
            )
        grad_b = (grad if ctx.bias_by_row else grad.sum(dim=0)) if needs_b else None
        return grad_z, None if grad_W is None else grad_W.view_as(W_dec), grad_b, None


def attach_encoder_gradient(
    code: SparseCode,
    x: Float[Tensor, "b s d"],
    b_dec: Float[Tensor, "s d"],
    W_enc: Float[Tensor, "f s d"],
    b_enc: Float[Tensor, " f"] | None,
) -> SparseCode:
    """Return `code` with gradients for x, b_dec, W_enc and b_enc.

    The values of `code` must be those of (x - b_dec) W_encᵀ [+ b_enc] at its entries.
    """
    return SparseCode(code.pattern, _AttachEncoderGradient.apply(code.values, x, b_dec, W_enc, b_enc, code.pattern))


class _AttachEncoderGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, x: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor | None, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(x, b_dec, W_enc)
        ctx.pattern, ctx.factors = pattern, getattr(W_enc, "factors", None)
        return z.to(x.dtype, copy=True)  # under autocast z is bf16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b_dec, W_enc = ctx.saved_tensors
        _, needs_x, needs_b_dec, needs_W, needs_b_enc, _ = ctx.needs_input_grad
        pattern = ctx.pattern
        entries, padded = pattern.by_latent, pattern.padded
        g, W = entries.sort(grad), W_enc.flatten(1)
        per_latent = torch.segment_reduce(g, "sum", offsets=entries.offsets, initial=0)
        grad_x = grad_b_dec = grad_W = None
        if needs_x:
            grad_x = weighted_sums(pattern.row_offsets, pattern.latents, grad, W, padded).view_as(x)
        if needs_b_dec:
            grad_b_dec = -(per_latent @ W).view_as(b_dec)
        if needs_W:
            centered = (x - b_dec).flatten(1)
            grad_W = gradient_or_factors(ctx.factors, RowGradient(entries.offsets, entries.rows, g, centered, padded))
        grad_W = None if grad_W is None else grad_W.view_as(W_enc)
        return None, grad_x, grad_b_dec, grad_W, per_latent if needs_b_enc else None, None


class RowGradient(NamedTuple):
    """Factors of the gradient of a matrix W (f, d) with one row per latent.

    dW_c = sum_{offsets_c <= j < offsets_{c+1}} weights_j rows[indices_j]
    """

    offsets: Int[Tensor, " f+1"]
    indices: Int[Tensor, " nnz"]
    weights: Float[Tensor, " nnz"]
    rows: Float[Tensor, "m d"]
    padded: bool = False
    """Whether there may be entries after offsets[-1], which belong to no latent."""

    def to_dense(self) -> Float[Tensor, "f d"]:
        """Return the gradient as a matrix."""
        return weighted_sums(*self)


def gradient_or_factors(factors: list[RowGradient] | None, gradient: RowGradient) -> Float[Tensor, "f d"] | None:
    """Return the gradient as a matrix; or hand its factors over, if the parameter collects them (see RowAdam)."""
    if factors is None:
        return gradient.to_dense()
    factors.append(gradient)
    return None


def weighted_sums(
    offsets: Int[Tensor, " n+1"],
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    rows: Float[Tensor, "m d"],
    padded: bool = False,
) -> Float[Tensor, "n d"]:
    """Compute out_i = sum_{offsets_i <= j < offsets_{i+1}} weights_j rows[indices_j]: a sparse-dense matrix product.

    Args:
        padded: whether there may be entries after offsets[-1], which are left out.
    """
    if rows.is_cuda and HAS_TRITON:
        from sae_lab.ops import sparse_triton  # here, because importing Triton takes a second

        return sparse_triton.weighted_sums(offsets, indices, weights, rows, padded)
    if padded:  # the entries after the last offset are a segment of their own, of row 0
        segments, n = F.pad(offsets, (0, 1), value=len(indices)), len(offsets) - 1
        is_padding = torch.arange(len(indices), device=offsets.device) >= offsets[-1]
        return weighted_sums(segments, indices.masked_fill(is_padding, 0), weights, rows)[:n]
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def dot_products(
    offsets: Int[Tensor, " n+1"],
    indices: Int[Tensor, " nnz"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "m d"],
    padded: bool = False,
) -> Float[Tensor, " nnz"]:
    """Compute out_j = left_i · right[indices_j] for offsets_i <= j < offsets_{i+1}: a sampled dense-dense product.

    Args:
        padded: whether there may be entries after offsets[-1]. Their product is zero.
    """
    if left.is_cuda and HAS_TRITON:
        from sae_lab.ops import sparse_triton

        return sparse_triton.dot_products(offsets, indices, left, right, padded)
    if padded:
        segment = segment_of_entry(offsets, len(indices))
        products = left[segment.clamp_max(len(left) - 1)] * right[indices.clamp_max(len(right) - 1)]
        return products.sum(-1).masked_fill(segment == len(left), 0)
    size = (len(left), len(right))
    sampled = torch.sparse_csr_tensor(offsets, indices, left.new_zeros(len(indices)), size, check_invariants=False)
    return torch.sparse.sampled_addmm(sampled, left, right.T).values()


def segment_of_entry(offsets: Int[Tensor, " n+1"], nnz: int) -> Int[Tensor, " nnz"]:
    """Return the segment i with offsets_i <= j < offsets_{i+1} of each entry j; n for entries after the last offset."""
    return torch.searchsorted(offsets, torch.arange(nnz, device=offsets.device), right=True) - 1


def stable_argsort(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the stable order that sorts the keys ascending."""
    if not numpy_may_read(keys):
        return keys.int().argsort(stable=True)  # radix sort: int32 takes half the passes over half the bytes
    # numpy sorts integers with AVX-512, 100 x faster than torch: pack each key and its position into one integer.
    bits = len(keys).bit_length()
    tagged = (keys << bits) | torch.arange(len(keys))
    tagged.numpy().sort()
    return tagged & ((1 << bits) - 1)
