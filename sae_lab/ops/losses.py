"""Loss terms as pure functions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.parallel.collectives import gather_rows
from sae_lab.parallel.shards import sum_over_shards


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is in that."""
    return x if x.dtype == torch.float64 else x.float()


def mse(target: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Tensor:
    """Return mean_{b,s,d} (target - x_hat)², computed in float32 at any precision."""
    loss: Tensor = _MSE.apply(at_least_float32(x_hat).expand_as(target), at_least_float32(target))
    return loss


class _MSE(torch.autograd.Function):
    """Mean squared error with the bits of `(target - x_hat).square().mean()`, in half as many passes over memory.

    The gradient of F.mse_loss is rounded otherwise where the loss is one of several in a mean.
    """

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(x_hat, target)
        return F.mse_loss(target, x_hat)  # sums in the order of target's memory, as the formula does

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x_hat, target = ctx.saved_tensors
        gradient = (target - x_hat).mul_(grad / (target.numel() / -2))
        return gradient, -gradient if ctx.needs_input_grad[1] else None


def mean_of_levels(target: Float[Tensor, "b s d"], levels: Sequence[Float[Tensor, "#b s d"]]) -> Tensor:
    """Return the mean of `mse` over several reconstructions.

    One after the other: on a CPU their rows stay in the cache, where a tensor of all levels would not.
    """
    return torch.stack([mse(target, x_hat) for x_hat in levels]).mean()


def l1(code: Code, weights: Float[Tensor, " f"] | None = None) -> Tensor:
    """Return mean_b sum_f |z_f| [weights_f], computed in float32 at any precision."""
    if isinstance(code, SparseCode):
        z = code.values.float().abs()
        # the latent f of padding has weight 0
        weighted = z if weights is None else z * F.pad(weights, (0, 1))[code.latents]
        return sum_over_shards(weighted.sum() / code.shape[0])
    z = code.float().abs()
    return sum_over_shards((z if weights is None else z * weights).sum(dim=-1).mean())


def lp(code: Float[Tensor, "b f"], p: Tensor | float) -> Tensor:
    """Return mean_b sum_{f: z != 0} |z|^p, computed in float32 at any precision. With p = 1 it is the L1 penalty.

    Inactive latents get no gradient, although that of |z|^p grows without bound where z falls to zero (p < 1).
    """
    z = code.float().abs()
    active = z > 0
    return sum_over_shards(torch.where(active, torch.where(active, z, 1.0).pow(p), 0.0).sum(dim=-1).mean())


def tanh(z: Float[Tensor, "b f"]) -> Tensor:
    """Return mean_b sum_f tanh(4 z_f), a smooth L0. Conerly et al. 2025 (Anthropic, January 2025)."""
    return sum_over_shards((4 * z).tanh().sum(dim=-1).mean())


def quadratic_frequency(frequencies: Float[Tensor, " f"], scale: float) -> Tensor:
    """Return sum_f p_f² / scale for the share of rows p_f on which each latent is active.

    A penalty on L0 = sum_f p_f alone does not see whether few latents fire often or many rarely. This one weighs as
    much as L0 for a latent of p_f = scale, more for denser latents and less for rarer ones.

    Smith, Rajamanoharan et al. 2025 (GDM Mech Interp Team Progress Update #2).
    """
    return sum_over_shards(frequencies.square().sum()) / scale


def pre_activation(h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], dead: Bool[Tensor, " f"]) -> Tensor:
    """Return mean_b sum_{dead f} relu(theta_f - h_f): how far dead latents are below their thresholds.

    It lowers the thresholds of dead latents and raises their pre-activations, whatever the reconstruction needs.

    Conerly et al. 2025 (Anthropic, January 2025), there for every latent that is not active; SAELens takes dead ones.
    """
    return sum_over_shards(((theta - h).relu() * dead).float().sum(dim=-1).mean())


def contrast(z: Float[Tensor, "b f"], other: Float[Tensor, "b f"]) -> Tensor:
    """Return the mean cross-entropy of finding each row's partner, in both directions, in float32 at any precision.

    Rows are looked for among those of all ranks, by the latents of all shards.

    L = -½ mean_i (log softmax_j(z_i · other_j) + log softmax_j(z_j · other_i)) at j = i
    """
    z, other = gather_rows(z), gather_rows(other)
    logits = sum_over_shards(at_least_float32(z) @ at_least_float32(other).T)
    return -(logits.log_softmax(dim=1).diagonal() + logits.log_softmax(dim=0).diagonal()).mean() / 2
