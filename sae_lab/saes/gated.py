"""Gated: one affine map decides which latents are active, another one how strongly."""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.ops import losses, sparse
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.penalized import PenalizedLinearSAE


class GatedSAE(PenalizedLinearSAE):
    """Gated SAE: one affine map decides which latents are active, another one how strongly.

        u      = (x - b_dec) W_encᵀ,   h = u + b_gate
        z      = 1[h > 0] · relu(exp(r_mag) u + b_mag)
        x_gate = relu(h) W_dec + b_dec, with W_dec and b_dec held fixed
        loss   = mean (x - x_hat)² + l1_coefficient * mean_b sum_f relu(h) + mean (x - x_gate)²

    b_gate is the parameter `b_enc`. No gradient passes the step 1[h > 0], so x_gate is what teaches the gate which
    latents are useful. The penalty is on relu(h), so z does not shrink. The decoder learns from z alone, not from
    x_gate, so x_hat stays good however many latents are active, and the penalty must be larger than that of an L1 SAE.
    On rows of three of 24 planted features, a coefficient of 0.01 gives 3.4 active latents and finds all features, and
    0.002 gives 13 and finds none.

    Rajamanoharan et al. 2024, arXiv 2404.16014, with means over (b, s, d) where the paper sums over d.

    Args:
        l1_coefficient: weight of the penalty.
    """

    shardable = True
    pre_activation_parameters = ("b_enc", "b_mag")

    def __init__(self, l1_coefficient: Annotated[float, Ge(0)] = 0.01, **penalized: Any):
        super().__init__(**penalized)
        self.l1_coefficient = l1_coefficient
        self.r_mag = nn.Parameter(torch.zeros(len(self.own_latents)))
        self.b_mag = nn.Parameter(torch.zeros(len(self.own_latents)))

    def latent_axes(self) -> dict[str, int]:
        return super().latent_axes() | {"r_mag": 0, "b_mag": 0}

    def activate(self, h: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        u = h if self.b_enc is None else h - self.b_enc
        return (h > 0) * (self.r_mag.exp() * u + self.b_mag).relu()

    def resampled_values(self) -> list[tuple[nn.Parameter, float]]:
        return [*super().resampled_values(), (self.r_mag, 0.0), (self.b_mag, 0.0)]

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        assert out.h is not None
        gate = out.h.relu()
        x_gate = sparse.decode(gate, self.W_dec.detach(), self.decoder_offset(out.x).detach())
        return super().losses(out) | {
            "sparsity": self.scale_by_warmup(self.l1_coefficient * self.sparsity(self.penalized(out))),
            "gate": losses.mse(out.target, x_gate),
        }

    def penalized(self, out: SAEOutput) -> Tensor:
        assert out.h is not None
        return self.weigh(out.h.relu())
