"""Gated: one affine map decides which latents are active, another how strongly."""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.ops import losses, sparse
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.penalized import PenalizedLinearSAE


class GatedSAE(PenalizedLinearSAE):
    """u = (x - b_dec) W_encᵀ,   z = 1[u + b_gate > 0] · relu(exp(r_mag) u + b_mag)

    loss = mean (x - x_hat)² + l1_coefficient * mean_b sum_f relu(h) + mean (x - x_gate)²,   h = u + b_gate,
    x_gate = relu(h) W_dec + b_dec with W_dec and b_dec held fixed

    b_gate is `b_enc`. The step lets no gradient through: x_gate is what teaches the gate to be of use (without it
    b_gate would never learn), and as the penalty falls on relu(h), z does not shrink. The fixed decoder serves z
    alone; so x_hat stays good however many latents are open, and the penalty must ask for more than an L1 SAE's:
    on rows of three planted features, 0.01 opens 3.4 latents and finds all 24, 0.002 opens 13 and finds none.

    Rajamanoharan et al. 2024, arXiv 2404.16014, with means over (b, s, d) where the paper sums over d.
    """

    pre_activation_parameters = ("b_enc", "b_mag")

    def __init__(self, l1_coefficient: Annotated[float, Ge(0)] = 0.01, **penalized: Any):
        super().__init__(**penalized)
        self.l1_coefficient = l1_coefficient
        self.r_mag = nn.Parameter(torch.zeros(self.n_latents))
        self.b_mag = nn.Parameter(torch.zeros(self.n_latents))

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
            "sparsity": self.scale_by_warmup(self.l1_coefficient * losses.l1(gate)),
            "gate": losses.mse(out.target, x_gate),
        }
