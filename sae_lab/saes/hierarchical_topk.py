"""Hierarchical TopK: one SAE for every number of active latents up to k."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from sae_lab.ops import losses, sparse
from sae_lab.ops.budgets import split_by_rank
from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.matryoshka import NestedOutput
from sae_lab.saes.topk import TopKSAE, WholeK

Budgets = Annotated[
    Sequence[Annotated[int, Ge(1)]] | Literal["all"] | None,
    ErrorMessage("must be null, all, or a list of whole numbers of at least 1"),
]


class HierarchicalTopKSAE(TopKSAE):
    """TopK SAE whose largest latents reconstruct at every budget, so that k can be lowered after training.

        x_hat^(j) = sum_{i among the j largest z} z_i W_dec_i + b_dec
        loss      = mean_{j in budgets} mean (x - x_hat^(j))² + aux

    z is TopK's, and the auxiliary loss uses the residual at k. `with_k(j)` encodes with the j largest latents.

    All budgets together cost one decoding of the code: each row is split by rank into as many rows as there are
    budgets, and their reconstructions are added up. The memory is that of b · d numbers for each budget.

    Balagansky et al. 2025, arXiv 2505.24473. The paper's loss has every budget from 1 to k, all with equal weight
    (`all`). The default has k, k/2, k/4 and k/8: budgets below k/8 made the SAE a fifth worse at k (docs/saes.md).

    Args:
        k: the largest budget.
        budgets: the numbers of active latents at which the loss is taken, none above k; k itself always is one of
            them. None: k, k/2, k/4 and k/8, rounded down. `all`: every number.

    Raises:
        UserError: k is not a whole number between 1 and n_latents, or a budget is above k.
    """

    shardable = True

    starts: Tensor
    """The rank of the first latent that each budget adds to the one before."""

    def __init__(self, k: WholeK, budgets: Budgets = None, **sparse: Any):
        super().__init__(k=k, **sparse)
        self.budgets = budgets
        if budgets is None:
            chosen = [budget for i in range(4) if (budget := int(k) >> i)]
        else:
            chosen = list(range(1, int(k))) if budgets == "all" else [int(n) for n in budgets]
        if above := [n for n in chosen if n > k]:
            raise SettingError(f"{{budgets}}={budgets} has {above[0]}, which is above {{k}}={k}: lower it, or raise k.")
        starts = torch.tensor([0, *sorted({n for n in chosen if n < k})])
        self.register_buffer("starts", starts, persistent=False)

    def with_k(self, k: float) -> Self:
        given = self.budgets
        budgets = [n for n in given if n <= k] if isinstance(given, Sequence) and given != "all" else given
        return self.convert_to(type(self), k=k, budgets=budgets)

    def deployed(self) -> TopKSAE:
        return self.convert_to(TopKSAE)

    def output(
        self, x: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"], code: Code, h: Float[Tensor, "b f"] | None
    ) -> NestedOutput:
        assert isinstance(code, SparseCode)
        added = split_by_rank(code, self.starts)
        parts = sparse.decode(added, self.W_dec, torch.zeros_like(self.b_dec)).unflatten(0, (len(x), len(self.starts)))
        levels = tuple(accumulate(parts.unbind(1), initial=self.decoder_offset(x)))
        return NestedOutput(x, target, levels[-1], code, h, levels)

    def reconstruction(self, out: SAEOutput) -> Tensor:
        assert isinstance(out, NestedOutput)
        return losses.mean_of_levels(out.target, out.levels[1:])
