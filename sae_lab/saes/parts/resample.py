"""New starts for dead latents, in the directions of rows that an SAE reconstructs badly."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCALE = 0.2
"""The length of a resampled latent's encoder, in mean lengths of those alive: it fires, and disturbs little."""


def draw_badly_reconstructed(loss: Float[Tensor, " b"], n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """n different rows, drawn one after the other with probability proportional to loss²."""
    weights = (loss.double() / loss.max()).square().clamp_min(1e-12).cpu()
    return weights.multinomial(n, replacement=False, generator=generator).to(loss.device)


def scale_to_unit_norm(x: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
    """Every row at norm one."""
    return x / x.flatten(1).norm(dim=1)[:, None, None]
