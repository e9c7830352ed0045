"""JumpReLU and the step that counts it, with the gradient of a step blurred by a kernel (see `JumpReLUSAE`)."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def jump_relu(
    h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], bandwidth: float | Tensor, into_h: bool = False
) -> Float[Tensor, "b f"]:
    """Compute h · 1[h > theta], with the kernel's gradient for theta, and for h as well if `into_h`."""
    return _JumpReLU.apply(h, theta, bandwidth, into_h)


def step_frequencies(
    h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], bandwidth: float | Tensor, into_h: bool = False
) -> Float[Tensor, " f"]:
    """Compute mean_b 1[h > theta], with the kernel's gradient for theta, and for h as well if `into_h`."""
    return _StepFrequencies.apply(h if into_h else h.detach(), theta, bandwidth)


def in_kernel_window(
    h: Float[Tensor, "b f"], theta: Float[Tensor, " f"], bandwidth: float | Tensor
) -> Bool[Tensor, "b f"]:
    """Compute R((h - theta) / bandwidth): True where h is within half a bandwidth of its threshold."""
    return (h - theta).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, bandwidth: float | Tensor, into_h: bool) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.bandwidth, ctx.into_h = bandwidth, into_h
        return h * (h > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, theta = ctx.saved_tensors
        near, height = grad * in_kernel_window(h, theta, ctx.bandwidth), theta / ctx.bandwidth
        grad_h = grad * (h > theta)
        if ctx.into_h:
            grad_h += (height * near).to(h.dtype)
        return grad_h, -height * near.sum(dim=0, dtype=theta.dtype), None, None


class _StepFrequencies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, bandwidth: float | Tensor) -> Tensor:
        near, rows = in_kernel_window(h, theta, bandwidth), bandwidth * len(h)
        ctx.rows = rows
        ctx.save_for_backward(near.sum(dim=0).to(theta.dtype) / rows, near if ctx.needs_input_grad[0] else None)
        return (h > theta).sum(dim=0).to(theta.dtype) / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        density, near = ctx.saved_tensors
        return None if near is None else grad / ctx.rows * near, -grad * density, None
