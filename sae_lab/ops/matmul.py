"""The dense product x Wᵀ + b, with the fastest kernel that torch offers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Products: TypeAlias = Literal["highest", "high", "medium"]
"""torch's precisions of float32 products on a GPU: float32, tf32 (10 bits of mantissa), bf16 (7 bits)."""


@contextmanager
def float32_products(precision: Products) -> Iterator[None]:
    """Compute float32 products with this precision inside the block, in all threads."""
    before = torch.get_float32_matmul_precision()
    if precision != before:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if precision != before:
            torch.set_float32_matmul_precision(before)


def linear(x: Float[Tensor, "b d"], W: Float[Tensor, "f d"], bias: Float[Tensor, " f"] | None = None) -> Tensor:
    """Compute x Wᵀ + bias like `F.linear`, for any strides.

    In float32 on a CPU it calls oneDNN. torch's default there is MKL, which does not use AVX-512 on AMD: measured on
    2 cores of an EPYC (Zen 5), torch 2.13, oneDNN was 2.1 x faster at b 4096, d 768, f 12288.
    """
    return _OneDNNLinear.apply(x, W, bias) if _can_use_onednn(x, W) else F.linear(x, W, bias)


def linear_by_part(
    x: Float[Tensor, "b n_parts*d"], W: Float[Tensor, "f d"], bias: Float[Tensor, " f"] | None, sizes: Sequence[int]
) -> Float[Tensor, "b f"]:
    """Apply `linear` part by part: part i of the output columns is part i of x times part i of the rows of W.

    Args:
        sizes: rows of W in each part, whose columns of x are equally many; none: one part.
    """
    if len(sizes) < 2:
        return linear(x, W, bias)
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    parts = zip(x.chunk(len(sizes), dim=1), W.split(sizes), biases, strict=True)
    return torch.cat([linear(*part) for part in parts], dim=1)


def _can_use_onednn(x: Tensor, W: Tensor) -> bool:
    return (
        x.device.type == W.device.type == "cpu"
        and x.numel() > 0 < W.numel()
        and x.dtype == W.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn_linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + bias by the operator through which torch.compile calls oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(ensure_dense(x), ensure_dense(W), bias, "none", [], "")


def ensure_dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if neither x nor its transpose is contiguous (a slice of columns, for example).

    oneDNN multiplies a transposed matrix as fast as any other, but other strides made a gradient up to 1,000 x slower.
    """
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        return _onednn_linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        needs_x, needs_W, needs_bias = ctx.needs_input_grad
        return (
            _onednn_linear(grad, W.T) if needs_x else None,
            _onednn_linear(grad.T, x.T) if needs_W else None,
            grad.sum(dim=0) if needs_bias else None,
        )
