"""Vanilla: a ReLU autoencoder with an L1 penalty."""

from typing import Annotated, Any

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.sparse import Code
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.penalized import PenalizedLinearSAE


class VanillaSAE(PenalizedLinearSAE):
    """ReLU SAE with an L1 penalty.

        z    = relu(h)
        loss = mean (x - x_hat)² + l1_coefficient * mean_b sum_f z |W_dec|

    Rows of W_dec have unit norm by default, so the penalty is mean_b sum_f z.

    Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023 (Towards Monosemanticity).

    Args:
        l1_coefficient: weight of the penalty.
        unit_norm: False leaves the norms of W_dec free (see LinearSAE). The minima are the same dictionaries, and only
            Adam's path to them differs.
    """

    shardable = True

    def __init__(self, l1_coefficient: Annotated[float, Ge(0)] = 0.002, **penalized: Any):
        super().__init__(**penalized)
        self.l1_coefficient = l1_coefficient

    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        return h.relu()

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        penalty = self.sparsity(self.penalized(out))
        return super().losses(out) | {"sparsity": self.scale_by_warmup(self.l1_coefficient * penalty)}

    def penalized(self, out: SAEOutput) -> Tensor:
        assert isinstance(out.code, Tensor)
        return self.weigh(out.code)
