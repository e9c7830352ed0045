"""Gradients of matrices with one row per latent, in parts: factors over the active entries, and single rows.

The auxiliary loss reads the rows of dead latents alone. Its gradient is a few rows, so it joins the factors of the
other losses' gradient (RowGradient) instead of filling a matrix of zeros.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lab.ops.sparse import RowGradient, segment_of_entry


class SomeRows(NamedTuple):
    """A gradient that is zero except in some rows: row positions_i is rows_i. Positions of f stand for no row."""

    positions: Int[Tensor, " n"]
    rows: Float[Tensor, "n d"]

    def to_dense(self, n_latents: int) -> Float[Tensor, "f d"]:
        """Return the gradient as a matrix."""
        whole = self.rows.new_zeros(n_latents + 1, self.rows.shape[1])
        return whole.index_copy_(0, self.positions, self.rows)[:n_latents]


def select_rows(W: Float[Tensor, "f d"], positions: Int[Tensor, " n"], owner: Tensor) -> Float[Tensor, "n d"]:
    """Return rows of W; zeros for positions of f. In the backward pass a parameter that collects gets SomeRows.

    Args:
        W: the parameter `owner`, flattened.
        positions: ascending, each row at most once.
        owner: the parameter. It collects if it has a list `factors` (see training/row_adam.py).
    """
    return _SelectRows.apply(W, positions, getattr(owner, "factors", None))


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, positions: Tensor, factors: list[Any] | None) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.factors, ctx.n_latents = factors, len(W)
        exists = (positions < len(W)).to(W).unsqueeze(1)
        return W.index_select(0, positions.clamp_max(len(W) - 1)) * exists

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        part = SomeRows(ctx.saved_tensors[0], grad)
        if ctx.factors is None:
            return part.to_dense(ctx.n_latents), None, None
        ctx.factors.append(part)
        return None, None, None


def add_rows(gradient: RowGradient, part: SomeRows) -> RowGradient:
    """Return factors of the sum of both: each of the rows becomes one more entry of its latent, the first one.

    Entries keep their order, so an entry j of latent c moves by the number of rows up to c. Shapes depend on shapes.
    """
    n_latents, n, n_rows = len(gradient.offsets) - 1, len(gradient.indices), len(part.positions)
    device = part.positions.device
    has_row = torch.zeros(n_latents + 1, dtype=torch.long, device=device)
    has_row = has_row.scatter_(0, part.positions, 1)[:n_latents]
    moved = F.pad(has_row.cumsum(0), (1, 0))  # by which the entries of latent c - 1 move, and the start of latent c
    offsets = gradient.offsets + moved
    latent = segment_of_entry(gradient.offsets, n)
    entries = torch.arange(n, device=device) + moved[(latent + 1).clamp_max(n_latents)]
    # Positions that stand for no row share a place after all others.
    starts = F.pad(offsets[:-1], (0, 1), value=n + n_rows)[part.positions]
    indices = torch.zeros(n + n_rows + 1, dtype=gradient.indices.dtype, device=device)
    weights = gradient.weights.new_zeros(n + n_rows + 1)
    indices.scatter_(0, entries, gradient.indices).scatter_(
        0, starts, len(gradient.rows) + torch.arange(n_rows, device=device, dtype=indices.dtype)
    )
    weights.scatter_(0, entries, gradient.weights).scatter_(0, starts, torch.ones_like(weights[:n_rows]))
    rows = torch.cat([gradient.rows, part.rows.to(gradient.rows)])
    return RowGradient(offsets, indices[:-1], weights[:-1], rows, padded=True)
