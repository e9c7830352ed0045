"""Resampling of dead latents: their new directions are those of rows that the SAE reconstructs badly."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCALE = 0.2
"""Norm of a resampled latent's encoder row, relative to the mean norm of live latents: it fires but disturbs little."""


def draw_badly_reconstructed(loss: Float[Tensor, " b"], n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Draw n different rows, one after another, with probability proportional to loss²."""
    weights = (loss.double() / loss.max()).square().clamp_min(1e-12).cpu()
    return weights.multinomial(n, replacement=False, generator=generator).to(loss.device)


def scale_to_unit_norm(x: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
    """Divide every row by its norm."""
    return x / x.flatten(1).norm(dim=1)[:, None, None]
