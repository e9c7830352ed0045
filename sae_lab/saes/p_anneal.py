"""p-annealing: the L1 penalty turns into an L_p^p penalty with p below 1 while the SAE trains."""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.losses import lp
from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.gated import GatedSAE
from sae_lab.saes.penalized import PenalizedLinearSAE
from sae_lab.saes.vanilla import VanillaSAE


class PAnneal(PenalizedLinearSAE):
    """Replaces an L1 penalty by one that is annealed towards L0.

        penalty = scale · mean_b sum_f z^p        p: 1 until anneal_start, then linearly down to p_end at anneal_end

    A smaller p punishes a latent more for being active and less for how strongly it is. A sum of z^p grows as p falls
    where z is below 1 and shrinks where it is above, so each change of p also changes the scale, such that the penalty
    of the batch stays as it was:

        scale <- scale · (sum z^p of the last p) / (sum z^p of the new p)

    Karvonen et al. 2024, arXiv 2408.00113. Their code changes p ten times in a run, by means over ten batches; here
    both change a little with every batch. `class Mine(PAnneal, AnySAE)` anneals the L1 penalty of any SAE.

    Args:
        p_end: p from `anneal_end` on.
        anneal_start: number of training batches with p = 1.
        anneal_end: number of training batches after which p is p_end.

    Raises:
        UserError: a setting is out of range, or `anneal_end` is not above `anneal_start`.
    """

    scale: Tensor

    def __init__(
        self,
        anneal_start: Annotated[int, Ge(0)],
        anneal_end: Annotated[int, Ge(1)],
        p_end: Annotated[float, Gt(0), Le(1)] = 0.2,
        **penalized: Any,
    ):
        super().__init__(**penalized)
        if anneal_end <= anneal_start:
            raise SettingError(
                f"{{anneal_end}}={anneal_end} must be above {{anneal_start}}={anneal_start}: p falls between them."
            )
        self.anneal_start, self.anneal_end, self.p_end = anneal_start, anneal_end, p_end
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def restart(self) -> None:
        super().restart()
        self.scale.fill_(1)

    def p(self, step: Tensor) -> Tensor:
        """Return p of the step-th training batch, counted from 1."""
        share = ((step - self.anneal_start) / (self.anneal_end - self.anneal_start)).clamp(0, 1)
        return 1 + (self.p_end - 1) * share

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        out = super().forward(x)
        if self.training:
            self.keep_size(self.penalized(out))
        return out

    @torch.no_grad()
    def keep_size(self, z: Float[Tensor, "b f"]) -> None:
        """Change the scale such that the penalty on this batch does not change by its new p."""
        before, now = (mean_over_ranks(lp(z, self.p(step))) for step in (self.steps - 1, self.steps))
        self.scale *= torch.where(now > 0, before / now, 1.0)

    def sparsity(self, z: Float[Tensor, "b f"]) -> Tensor:
        return self.scale * lp(z, self.p(self.steps))


class PAnnealSAE(PAnneal, VanillaSAE):
    """ReLU SAE with an annealed penalty (see PAnneal)."""

    shardable = True

    def deployed(self) -> VanillaSAE:
        return self.convert_to(VanillaSAE)


class PAnnealGatedSAE(PAnneal, GatedSAE):
    """Gated SAE with an annealed penalty on its gate (see PAnneal)."""

    shardable = True

    def deployed(self) -> GatedSAE:
        return self.convert_to(GatedSAE)
