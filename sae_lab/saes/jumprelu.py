"""JumpReLU: each latent learns its own threshold."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.penalized import PenalizedLinearSAE
from sae_lab.saes.sparse_linear import check_active


class JumpReLUSAE(PenalizedLinearSAE):
    """JumpReLU SAE: each latent learns its own threshold theta.

        z       = h · 1[h > theta]
        L0      = mean_b sum_f 1[h > theta]
        penalty = (L0 / k - 1)² (target_l0),   L0 (l0)   or   mean_b sum_f tanh(4 z) (tanh)
        loss    = mean (x - x_hat)² + sparsity_coefficient * penalty + aux

    The step has no gradient in theta. Training uses the gradient of a step blurred by the kernel R(u) = 1[|u| < 1/2]:

        d z / d theta            = -(theta / bandwidth) R((h - theta) / bandwidth)
        d 1[h > theta] / d theta = -R((h - theta) / bandwidth) / bandwidth

    R is applied to h, not to z: z is zero below theta, so half of the window would be empty. The parameter is theta
    itself, at least zero, in float32. As exp(phi) it would hardly move: under Adam by about theta · lr per step. A
    latent that has fallen below the window gets no gradient from these terms, hence the auxiliary loss.

    Rajamanoharan et al. 2024, arXiv 2407.14435 (l0, and target_l0 in an appendix); tanh: Anthropic, January 2025.
    The default is target_l0, because k then has the same meaning as in a top-k SAE. With the other penalties L0 depends
    on the coefficient, d, f and the scale of the input. As h has a bias b_enc, subtracting b_dec only affects the
    initial state.

    Args:
        k: the mean number of active latents per row that target_l0 aims at; the other penalties ignore it.
        penalty: `target_l0`, `l0` or `tanh`.
        sparsity_coefficient: weight of the penalty; None: COEFFICIENTS[penalty], for inputs of unit std.
        theta: initial value of all thresholds.
        bandwidth: width of R, in units of h.

    Raises:
        UserError: a setting is unknown or out of range, or target_l0 has no k between 1 and n_latents.
    """

    pre_activation_parameters = ("b_enc", "thresholds")

    # With 1, target_l0 ended 7 % above k on the bundled model after 2 M tokens at expansion 8. Runs of other lengths or
    # sizes end at other values.
    COEFFICIENTS = {"target_l0": 1.0, "l0": 0.005, "tanh": 0.005}

    def __init__(
        self,
        k: float | None = None,
        penalty: Literal["target_l0", "l0", "tanh"] = "target_l0",
        sparsity_coefficient: Annotated[float, Ge(0)] | None = None,
        theta: Annotated[float, Ge(0)] = 0.1,
        bandwidth: Annotated[float, Gt(0)] = 0.1,
        auxk_coefficient: Annotated[float, Ge(0)] = 1 / 32,
        **penalized: Any,
    ):
        super().__init__(auxk_coefficient=auxk_coefficient, **penalized)
        if penalty == "target_l0":
            if k is None:
                raise SettingError("{penalty}=target_l0 needs a k to aim at: give {k}=..., or another penalty.")
            check_active(self.n_latents, k=k)
        self.k, self.penalty, self.sparsity_coefficient = k, penalty, sparsity_coefficient
        self.theta, self.bandwidth = theta, bandwidth
        self.coefficient = self.COEFFICIENTS[penalty] if sparsity_coefficient is None else sparsity_coefficient
        self.thresholds = nn.Parameter(torch.full((self.n_latents,), float(theta)))

    def activate(self, h: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        return jump_relu(h, self.thresholds, self.bandwidth)

    def resampled_values(self) -> list[tuple[nn.Parameter, float]]:
        return [*super().resampled_values(), (self.thresholds, self.theta)]

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        return super().losses(out) | {"sparsity": self.scale_by_warmup(self.coefficient * self.compute_penalty(out))}

    def compute_penalty(self, out: SAEOutput) -> Tensor:
        """Compute the penalty, without its coefficient."""
        if self.penalty == "tanh":
            assert isinstance(out.code, Tensor)
            return (4 * out.code.float()).tanh().sum(dim=-1).mean()
        assert out.h is not None
        l0 = mean_l0(out.h, self.thresholds, self.bandwidth)
        return l0 if self.k is None or self.penalty == "l0" else (mean_over_ranks(l0) / self.k - 1).square()

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.thresholds.clamp_min_(0)


def jump_relu(h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], bandwidth: float) -> Float[Tensor, "b f"]:
    """Compute h · 1[h > theta], with the kernel's gradient for theta."""
    return _JumpReLU.apply(h, theta, bandwidth)


def mean_l0(h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], bandwidth: float) -> Tensor:
    """Compute mean_b sum_f 1[h > theta], with the kernel's gradient for theta and none for h."""
    return _MeanL0.apply(h.detach(), theta, bandwidth)


def in_kernel_window(h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], bandwidth: float) -> Bool[Tensor, "b f"]:
    """Compute R((h - theta) / bandwidth): True where h is within half a bandwidth of its threshold."""
    return (h - theta).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.bandwidth = bandwidth
        return h * (h > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, theta = ctx.saved_tensors
        near = (grad * in_kernel_window(h, theta, ctx.bandwidth)).sum(dim=0, dtype=theta.dtype)
        return grad * (h > theta), -(theta / ctx.bandwidth) * near, None


class _MeanL0(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        near = in_kernel_window(h, theta, bandwidth).sum(dim=0)
        ctx.save_for_backward(near.to(theta.dtype) / (bandwidth * len(h)))
        return (h > theta).sum().to(theta.dtype) / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (density,) = ctx.saved_tensors
        return None, -grad * density, None
