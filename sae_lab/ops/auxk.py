"""The auxiliary loss: dead latents learn to reconstruct the residual of the live ones."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lab.ops.matmul import linear
from sae_lab.ops.selection import (
    Pieces,
    Preactivations,
    compared,
    just_below,
    kth_largest,
    select_top_k,
    select_top_of_batch,
    sortable,
)
from sae_lab.ops.sparse import attach_encoder_gradient, decode
from sae_lab.parallel.collectives import min_over_ranks
from sae_lab.parallel.mesh import latent_axis

SPARSE_FROM = {"cpu": 10, "cuda": 100}
"""Ratio n_dead / k_aux from which the sparse computation is used instead of the dense one. Measured at d 768, b 4096,
k_aux 384 on 2 cores: equally fast at 8, sparse 1.3 x faster at 16, 2.7 x at 32 and 64. Not measured on a GPU, where
dense products are faster."""


def auxk_loss(
    x: Float[Tensor, "b n"],
    residual: Float[Tensor, "b m"],
    W_enc: Float[Tensor, "n_dead n"],
    b_enc: Float[Tensor, " n_dead"] | None,
    W_dec: Float[Tensor, "n_dead m"],
    k_aux: int,
    over_batch: bool = False,
    signed: bool = False,
) -> Tensor:
    """Compute the auxiliary loss: the MSE between the residual e and its reconstruction from dead latents.

        loss = mean (e - sum_{top k_aux dead i} relu(h_i) W_dec_i)²        h = x W_encᵀ + b_enc

    Gao et al. 2024, arXiv 2406.04093, §A.2. Only W_enc, b_enc and W_dec get gradients: through the residual, live
    latents would be pulled towards the dead ones. There is no b_dec, since e does not contain it.

    Args:
        x: the encoder's input, centered.
        residual: e, what the live latents did not reconstruct.
        W_enc, b_enc, W_dec: the rows of the dead latents.
        k_aux: dead latents that take part, per row.
        over_batch: choose the top k_aux · b entries of the whole batch instead of the top k_aux of each row. Which of
            several entries tied for the last place are chosen is not specified.
        signed: choose by |h_i|, and keep h_i in place of relu(h_i).
    """
    if latent_axis().size == 1 and len(W_enc) < SPARSE_FROM[x.device.type] * k_aux:
        return _AuxK.apply(x, residual, W_enc, b_enc, W_dec, k_aux, over_batch, signed)
    with torch.no_grad():
        select = select_top_of_batch if over_batch else select_top_k
        code = select(Preactivations(x, W_enc, b_enc), k_aux, signed=signed)
    code = attach_encoder_gradient(code, x.unsqueeze(1), torch.zeros_like(x[:1]), W_enc.unsqueeze(1), b_enc)
    e_hat = decode(code, W_dec.unsqueeze(1), torch.zeros_like(residual[:1]))
    return (e_hat.squeeze(1) - residual).square().mean()


class _AuxK(torch.autograd.Function):
    """Dense `auxk_loss`, piece of rows by piece of rows, without ever holding a (b, n_dead) matrix.

    The forward pass computes the gradient of each piece as well. Faster than the sparse computation where k_aux is not
    much smaller than the number of dead latents.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        W_dec: Tensor,
        k_aux: int,
        over_batch: bool,
        signed: bool,
    ) -> Tensor:
        total = residual.new_zeros(())
        grad_W_enc, grad_W_dec = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
        grad_b_enc = None if b_enc is None else torch.zeros_like(b_enc)
        h = Preactivations(x, W_enc, b_enc)
        least = batch_threshold(h, k_aux, signed) if over_batch else None
        start = 0
        for piece in h:
            rows = slice(start, start := start + len(piece))
            sizes = compared(piece, signed)
            bound = just_below(row_thresholds(sizes, k_aux) if least is None else least).clamp_min(0)
            z = piece.mul_(sizes > bound)
            error = linear(z, W_dec.T) - residual[rows]
            total += error.square().sum()
            grad = error.mul_(2 / residual.numel())
            zT = z.T.contiguous()  # the products below read whole rows of it and of its gradient
            grad_W_dec += linear(zT, grad.T)
            grad_zT = linear(W_dec, grad).mul_(zT != 0)
            grad_W_enc += linear(grad_zT, x[rows].T)
            if grad_b_enc is not None:
                grad_b_enc += grad_zT.sum(dim=1)
        ctx.grads = grad_W_enc, grad_b_enc, grad_W_dec
        return total / residual.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_enc, W_dec = (None if g is None else g * grad for g in ctx.grads)
        return None, None, W_enc, b_enc, W_dec, None, None, None


def row_thresholds(h: Float[Tensor, "n n_dead"], k: int) -> Float[Tensor, "n 1"]:
    """Return the k-th largest entry of each row."""
    k = min(k, h.shape[-1])
    return kth_largest(sortable(h), k).view(h.dtype).unsqueeze(-1)


def batch_threshold(h: Pieces, k: int, signed: bool) -> Tensor:
    """Return the smallest of the k · b largest positive entries of the batch, over all ranks; 0 if there are none.

    With `signed`, of the largest absolute values.
    """
    values = compared(select_top_of_batch(h, k, signed=signed).values, signed)
    smallest = min_over_ranks(values.amin() if len(values) else values.new_tensor(torch.inf))
    return smallest.masked_fill(smallest.isinf(), 0)
