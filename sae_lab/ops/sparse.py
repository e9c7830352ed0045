"""Sparse codes: which latents are active on which rows and how strongly, and the products that touch only those.

A top-k SAE's step needs one dense product, the encoder's (see selection.py for what becomes of it). The rest is here:
each active entry e lies on a row r and a latent c, and takes part in

    x_hat_r  = sum_{e on r} z_e W_dec_c + b_dec          z_e       = (x_r - b_dec) · W_enc_c [+ b_enc_c]
    dz_e     = dx_hat_r · W_dec_c                        dW_enc_c  = sum_{e on c} dz_e (x_r - b_dec)
    dW_dec_c = sum_{e on c} z_e dx_hat_r                 db_enc_c  = sum_{e on c} dz_e
    db_dec   = sum_r dx_hat_r - sum_c db_enc_c W_enc_c   dx_r      = sum_{e on r} dz_e W_enc_c

so everything is one of two sums: weighted sums of rows, over the entries of a row or of a latent, and dot products,
one an entry: on a CPU by torch's sparse kernels, on a GPU by Triton's (sparse_triton.py), or by torch's where Triton
is missing. Nothing is added concurrently: two runs are equal to the bit.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lab.runtime.threads import one_thread

warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are implicitly)")

HAS_TRITON = find_spec("triton") is not None


class ByLatent(NamedTuple):
    """The entries of a pattern sorted by latent, then row: those of latent c are offsets[c] : offsets[c + 1]."""

    order: Int[Tensor, " nnz"]
    """Where each of them stands in the pattern."""
    rows: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " f+1"]

    @one_thread()
    def sort(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """Values in the pattern's order -> in this one."""
        return values[self.order]

    @one_thread()
    def unsort(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """Values in this order -> in the pattern's."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which latents are active where, as CSR: on row r latents[row_offsets[r] : row_offsets[r + 1]], ascending."""

    row_offsets: Int[Tensor, " b+1"]
    latents: Int[Tensor, " nnz"]
    n_latents: int

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The row of every entry."""
        n_rows = len(self.row_offsets) - 1
        rows = torch.arange(n_rows, device=self.latents.device)
        return rows.repeat_interleave(self.row_offsets.diff(), output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> ByLatent:
        with one_thread():
            order = stable_argsort(self.latents)
            offsets = F.pad(self.fire_counts().cumsum(0), (1, 0))
            return ByLatent(order, self.rows[order], offsets)

    def fire_counts(self) -> Int[Tensor, " f"]:
        """How many entries each latent has."""
        counts = self.latents.new_zeros(self.n_latents)
        return counts.scatter_add_(0, self.latents, torch.ones_like(self.latents))  # bincount makes a GPU's host wait


@dataclass(frozen=True, eq=False)
class SparseCode:
    """A code (b, f) as its active entries, whose values are not zero; gradients flow through `values`."""

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
        return self.values.new_zeros(self.shape).index_put((self.pattern.rows, self.latents), self.values)


Code: TypeAlias = SparseCode | Float[Tensor, "b f"]


def l0_per_row(code: Code) -> Int[Tensor, " b"]:
    """How many latents are active (not zero) on each row."""
    return code.row_offsets.diff() if isinstance(code, SparseCode) else (code != 0).sum(dim=-1)


def fire_counts(code: Code) -> Int[Tensor, " f"]:
    """On how many rows each latent is active."""
    return code.pattern.fire_counts() if isinstance(code, SparseCode) else (code != 0).sum(dim=0)


def fired_latents(code: Code) -> Bool[Tensor, " f"]:
    """Which latents are active on at least one row."""
    return fire_counts(code) > 0 if isinstance(code, SparseCode) else (code != 0).any(dim=0)


def smallest_positive(code: Code) -> Tensor:
    """min{z_ij | z_ij > 0}, a scalar; infinite where no entry is positive."""
    values = code.values if isinstance(code, SparseCode) else code.flatten()
    infinity = values.new_full((1,), float("inf"))
    return torch.cat([values.masked_fill(values <= 0, float("inf")), infinity]).min()


def split_by_group(code: Code, sizes: Sequence[int]) -> list[Code]:
    """The codes of consecutive groups of latents, numbered from 0 in each."""
    if not isinstance(code, SparseCode):
        return list(code.split(list(sizes), dim=-1))
    parts: list[Code] = []
    for stop, size in zip(accumulate(sizes), sizes, strict=True):
        entries = ((code.latents >= stop - size) & (code.latents < stop)).nonzero().squeeze(-1)
        row_offsets = torch.searchsorted(entries, code.row_offsets)
        parts.append(
            SparseCode(Pattern(row_offsets, code.latents[entries] - (stop - size), size), code.values[entries])
        )
    return parts


def keep_first_latents(code: Code, n: int) -> Code:
    """The code with every latent from the n-th on at zero."""
    first = split_by_group(code, [n, code.shape[1] - n])[0]
    if isinstance(first, SparseCode):
        return SparseCode(replace(first.pattern, n_latents=code.shape[1]), first.values)
    return F.pad(first, (0, code.shape[1] - n))


def decode(
    code: Code, W_dec: Float[Tensor, "f s d"], b_dec: Float[Tensor, "s d"] | Float[Tensor, "b s d"]
) -> Float[Tensor, "b s d"]:
    """x_hat = z W_dec + b_dec, with gradients for the code's values, W_dec and b_dec, one for all rows or one a row."""
    if isinstance(code, SparseCode):
        return _Decode.apply(code.values, W_dec, b_dec, code.pattern)
    return (code @ W_dec.flatten(1)).unflatten(-1, W_dec.shape[1:]) + b_dec


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, W_dec: Tensor, b_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(z, W_dec)
        ctx.pattern, ctx.bias_by_row = pattern, b_dec.ndim > 2
        x_hat = weighted_sums(pattern.row_offsets, pattern.latents, z, W_dec.flatten(1))
        return x_hat.add_(b_dec.flatten(-2)).unflatten(-1, W_dec.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, W_dec = ctx.saved_tensors
        needs_z, needs_W, needs_b, _ = ctx.needs_input_grad
        entries = ctx.pattern.by_latent
        grad_z = grad_W = None
        g = grad.flatten(1).contiguous()
        if needs_z:  # latent by latent: the rows of grad stay in cache, those of W_dec are read once
            grad_z = entries.unsort(dot_products(entries.offsets, entries.rows, W_dec.flatten(1), g))
        if needs_W:
            grad_W = weighted_sums(entries.offsets, entries.rows, entries.sort(z), g).view_as(W_dec)
        grad_b = (grad if ctx.bias_by_row else grad.sum(dim=0)) if needs_b else None
        return grad_z, grad_W, grad_b, None


def attach_encoder_gradient(
    code: SparseCode,
    x: Float[Tensor, "b s d"],
    b_dec: Float[Tensor, "s d"],
    W_enc: Float[Tensor, "f s d"],
    b_enc: Float[Tensor, " f"] | None,
) -> SparseCode:
    """`code`, whose values are (x - b_dec) W_encᵀ [+ b_enc] at its entries, with gradients for all four of them."""
    return SparseCode(code.pattern, _Encoded.apply(code.values, x, b_dec, W_enc, b_enc, code.pattern))


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, x: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor | None, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(x, b_dec, W_enc)
        ctx.pattern = pattern
        return z.to(x.dtype, copy=True)  # under autocast h is bf16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b_dec, W_enc = ctx.saved_tensors
        _, needs_x, needs_b_dec, needs_W, needs_b_enc, _ = ctx.needs_input_grad
        entries = ctx.pattern.by_latent
        g, W = entries.sort(grad), W_enc.flatten(1)
        per_latent = torch.segment_reduce(g, "sum", offsets=entries.offsets, initial=0)
        grad_x = grad_b_dec = grad_W = None
        if needs_x:
            grad_x = weighted_sums(ctx.pattern.row_offsets, ctx.pattern.latents, grad, W).view_as(x)
        if needs_b_dec:
            grad_b_dec = -(per_latent @ W).view_as(b_dec)
        if needs_W:
            grad_W = weighted_sums(entries.offsets, entries.rows, g, (x - b_dec).flatten(1)).view_as(W_enc)
        return None, grad_x, grad_b_dec, grad_W, per_latent if needs_b_enc else None, None


def weighted_sums(
    offsets: Int[Tensor, " n+1"],
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    rows: Float[Tensor, "m d"],
) -> Float[Tensor, "n d"]:
    """out_i = sum_{j from offsets_i to offsets_{i+1}} weights_j rows[indices_j]: a sparse matrix times a dense one."""
    if rows.is_cuda and HAS_TRITON:
        from sae_lab.ops import sparse_triton  # Triton takes a second to import

        return sparse_triton.weighted_sums(offsets, indices, weights, rows)
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def dot_products(
    offsets: Int[Tensor, " n+1"], indices: Int[Tensor, " nnz"], left: Float[Tensor, "n d"], right: Float[Tensor, "m d"]
) -> Float[Tensor, " nnz"]:
    """out_j = left_i · right[indices_j] for j from offsets_i to offsets_{i+1}: a sampled product of two dense ones."""
    if left.is_cuda and HAS_TRITON:
        from sae_lab.ops import sparse_triton

        return sparse_triton.dot_products(offsets, indices, left, right)
    size = (len(left), len(right))
    sampled = torch.sparse_csr_tensor(offsets, indices, left.new_zeros(len(indices)), size, check_invariants=False)
    return torch.sparse.sampled_addmm(sampled, left, right.T).values()


def stable_argsort(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order that makes the keys ascend, equal ones staying as they stand."""
    if keys.device.type != "cpu":
        return keys.int().argsort(stable=True)  # a radix sort: half the passes over half the bytes
    # numpy sorts plain numbers with AVX-512, 100 x faster than torch sorts: make each key one with its place.
    bits = len(keys).bit_length()
    tagged = (keys << bits) | torch.arange(len(keys))
    tagged.numpy().sort()
    return tagged & ((1 << bits) - 1)
