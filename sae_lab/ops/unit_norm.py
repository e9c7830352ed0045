"""Unit-norm constraint on a decoder: the row of every latent has norm one, so that z_i measures what latent i adds.

The norm of a row over sources and dimensions is `joint`, (sum_s |W_i,s|²)^½, or `sum`, sum_s |W_i,s|. They are equal if
s is 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def project_gradient(grad: Float[Tensor, "f s d"], W: Float[Tensor, "f s d"], norm: str) -> None:
    """Remove, in place, the part of each row's gradient that would change the row's norm: g - (g·u) u / |u|².

    u is the gradient of the norm: W_i for `joint`, W_i,s / |W_i,s| for each source for `sum`.
    """
    # Rows per piece: on a CPU as many as fit into its cache; on a GPU many, so that there are few operations.
    size = max(1, (2**26 if W.is_cuda else 2**21) // W[0].numel())
    direction = W if norm == "joint" else F.normalize(W, dim=-1)
    for g, u in zip(grad.flatten(1).split(size), direction.flatten(1).split(size), strict=True):
        # Rows are divided by their norm after every step, so a joint |u| is 1 to rounding; |u|² makes it exact.
        parallel = (g * u).sum(-1, keepdim=True) / u.norm(dim=-1, keepdim=True).square()
        g.addcmul_(u, parallel, value=-1)


@torch.no_grad()
def divide_by_norm(W: Float[Tensor, "f s d"], norm: str) -> None:
    """Divide every row by its norm, in place."""
    rows = W.flatten(1)
    length = rows.norm(dim=-1) if norm == "joint" else W.norm(dim=-1).sum(dim=-1)
    rows.div_(length.unsqueeze(-1).clamp_min(torch.finfo(rows.dtype).tiny))
