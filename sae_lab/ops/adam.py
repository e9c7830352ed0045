"""Adam on a matrix with one row per latent, from the factors of its gradient.

A step of a latent with weights w, moments m and v and entries e (its active entries in the batch) is

    g = sum_e weights_e rows_e              for W_dec: z_e dx_hat_r;  for W_enc: dz_e (x_r - b_dec)
    g = g - (g·w) w / |w|²                  with unit_norm (unit_norm.py, norm `joint`)
    m = m + (1 - β1) (g - m)
    v = v + (1 - β2) (g² - v)
    w = w - lr / (1 - β1^t) m / (sqrt(v) / sqrt(1 - β2^t) + eps)
    w = w / |w|                             with unit_norm

Torch needs an operation for each line, and each of them reads and writes matrices of the size of W. On a GPU one Triton
kernel (adam_triton.py) does all of it with the latent's row in registers, and the gradient is never written to memory.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from sae_lab.ops.sparse import HAS_TRITON, RowGradient
from sae_lab.ops.unit_norm import divide_by_norm, project_gradient


@torch.no_grad()
def adam_step(
    W: Float[Tensor, "f d"],
    exp_avg: Float[Tensor, "f d"],
    exp_avg_sq: Float[Tensor, "f d"],
    gradient: RowGradient,
    *,
    lr: Float[Tensor, ""],
    step: Float[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    unit_norm: bool = False,
    copy: Float[Tensor, "f d"] | None = None,
) -> None:
    """Take a step of torch.optim.Adam on W, in place: the equations above.

    A latent without entries has a zero gradient: its moments decay and move it, as in torch. The results are those of
    the separate operations to float32 rounding, and the same to the bit in every run.

    Args:
        W, exp_avg, exp_avg_sq: the parameter and torch.optim.Adam's state of it; contiguous.
        lr, step: on W's device; step is 1 in the first update.
        weight_decay: added to the gradient after the projection, as weight_decay W; if `decoupled` (torch.optim.AdamW),
            W is multiplied by 1 - lr weight_decay instead.
        unit_norm: project the gradient and divide W's rows by their norms.
        copy: overwritten with the new W in its own dtype, for example bfloat16 for the next product.
    """
    if W.is_cuda and HAS_TRITON:
        from sae_lab.ops import adam_triton  # here, because importing Triton takes a second

        adam_triton.adam_step(
            W, exp_avg, exp_avg_sq, *gradient[:4], lr, step, betas, eps, weight_decay, decoupled, unit_norm, copy
        )
        return
    g = gradient.to_dense()
    if unit_norm:
        project_gradient(g.unsqueeze(1), W.unsqueeze(1), "joint")
    update = adamw if decoupled else adam
    update(
        [W], [g], [exp_avg], [exp_avg_sq], [], [step - 1],  # it adds one to the step
        fused=True, amsgrad=False, maximize=False,
        lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    if unit_norm:
        divide_by_norm(W.unsqueeze(1), "joint")
    if copy is not None:
        copy.copy_(W)
