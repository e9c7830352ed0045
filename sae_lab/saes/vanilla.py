"""The ReLU autoencoder with an L1 penalty."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from sae_lab import losses
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.linear import PenalizedLinearSAE
from sae_lab.sparse import Code


class VanillaSAE(PenalizedLinearSAE):
    """z = relu(h),   loss = mean (x - x_hat)² + l1_coefficient * mean_b sum_f z

    Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023 (Towards Monosemanticity).
    """

    def __init__(self, l1_coefficient: float = 0.002, **penalized: Any):
        super().__init__(**penalized)
        self.l1_coefficient = l1_coefficient

    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        return h.relu()

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        return super().losses(out) | {"sparsity": self.warmed(self.l1_coefficient * losses.l1(out.code))}
