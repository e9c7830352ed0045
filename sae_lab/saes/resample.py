"""New starts for dead latents, in the directions of rows that an SAE reconstructs badly."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCALE = 0.2
"""The length of a resampled latent's encoder, in mean lengths of those alive: it fires, and disturbs little."""


def draw(loss: Float[Tensor, " b"], n: int, seed: int) -> Int[Tensor, " n"]:
    """n different rows, drawn one after the other with probability proportional to loss²."""
    generator = torch.Generator().manual_seed(seed)
    weights = (loss.double() / loss.max()).square().clamp_min(1e-12).cpu()
    return weights.multinomial(n, replacement=False, generator=generator).to(loss.device)


def directions(
    x: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"], b_dec: Float[Tensor, "s d"], n: int, seed: int
) -> Float[Tensor, "n s d"]:
    """x - b_dec at unit norm, for n rows drawn by their squared errors."""
    rows = draw((x - x_hat).square().sum(dim=(1, 2)), n, seed)
    v = x[rows] - b_dec  # what an encoder sees of the row
    return v / v.flatten(1).norm(dim=1)[:, None, None]
