"""The auxiliary loss: dead latents learn what the live ones leave over."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lab.matmul import linear
from sae_lab.selection import Preactivations, kth_largest, sortable


def auxk(
    x: Float[Tensor, "b n"],
    residual: Float[Tensor, "b n"],
    W_enc: Float[Tensor, "n_dead n"],
    b_enc: Float[Tensor, " n_dead"] | None,
    W_dec: Float[Tensor, "n_dead n"],
    k_aux: int,
) -> Tensor:
    """mean (e - sum_{top k_aux dead i} relu(h_i) W_dec_i)²,   h = x W_encᵀ + b_enc,   e the residual

    Gao et al. 2024, arXiv 2406.04093, §A.2. The weights are the dead latents' rows. Gradients reach them alone: through
    the residual, live latents would be pulled towards the dead ones. The sum has no bias, as e already lacks b_dec.
    Latents that tie for the last place all take part.
    """
    return _AuxK.apply(x, residual, W_enc, b_enc, W_dec, k_aux)


class _AuxK(torch.autograd.Function):
    """Walks over pieces of rows and takes the gradient on the way, so that no (b, n_dead) matrix exists.

    k_aux is of the order of the number of dead latents: a dense product costs less than one by active entry.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor | None, W_dec: Tensor, k_aux: int
    ) -> Tensor:
        total = residual.new_zeros(())
        grad_W_enc, grad_W_dec = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
        grad_b_enc = None if b_enc is None else torch.zeros_like(b_enc)
        start = 0
        for h in Preactivations(x, W_enc, b_enc):
            rows = slice(start, start := start + len(h))
            z = largest_of_rows(h, k_aux)
            error = linear(z, W_dec.T) - residual[rows]
            total += error.square().sum()
            grad = error.mul_(2 / residual.numel())
            grad_W_dec += linear(z.T, grad.T)
            grad_z = linear(grad, W_dec).mul_(z > 0)
            grad_W_enc += linear(grad_z.T, x[rows].T)
            if grad_b_enc is not None:
                grad_b_enc += grad_z.sum(dim=0)
        ctx.grads = grad_W_enc, grad_b_enc, grad_W_dec
        return total / residual.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_enc, W_dec = (None if g is None else g * grad for g in ctx.grads)
        return None, None, W_enc, b_enc, W_dec, None


def largest_of_rows(h: Float[Tensor, "b n_dead"], k: int) -> Float[Tensor, "b n_dead"]:
    """relu(h) with all but the k largest entries of each row zero (in place)."""
    if h.shape[-1] > k:
        order = sortable(h)
        h.masked_fill_(order < kth_largest(order, k).unsqueeze(-1), 0)
    return h.relu_()
