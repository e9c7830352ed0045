"""BatchTopK: k active latents per row on average, selected over the whole batch."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from sae_lab.ops.selection import Pieces, select_above, select_top_of_batch
from sae_lab.ops.sparse import Code, SparseCode, l0_per_row, smallest_active
from sae_lab.parallel.collectives import mean_over_ranks, min_over_ranks
from sae_lab.saes.sparse_linear import SparseLinearSAE


class BatchTopKSAE(SparseLinearSAE):
    """BatchTopK SAE: k active latents per row on average, selected over the whole batch.

        train      z keeps the k·b largest entries of relu(h) over the batch of b rows
        eval       z = relu(h) · 1[h > threshold]
        threshold  E_batches[min{|z_ij| : z_ij != 0}]

    With signed=true (see SparseLinearSAE), |h| takes the place of relu(h) and the entries keep their sign.

    During training the threshold is a bias-corrected running mean (rate 0.01). After training, `calibrate` replaces it
    by the plain mean over batches of training size, which is the write-up's estimate.

    With `quantile=running`, an idea of the write-up, training uses the threshold as well. It is then a running estimate
    of the 1 - k/f quantile of the pre-activations, updated after each batch:

        threshold <- threshold · (1 + quantile_rate · min(L0/k - 1, 1))        L0: mean over the batch

    It starts at the quantile of the first batch and stops changing when L0 is k on average. This is stochastic
    approximation: no batch needs a quantile of its own, and the estimate follows the encoder as it changes, where a
    mean of past quantiles would lag. Such an SAE is deployed exactly as it was trained, so `calibrate` does nothing.

    Bussmann, Leask, Nanda 2024, arXiv 2412.06410.

    Args:
        k: the mean number of active latents per row. May be a fraction: floor(k·b) entries are kept.
        quantile: `batch` or `running`.
        quantile_rate: update rate of the running quantile.

    Raises:
        UserError: k is not between 1 and n_latents, `quantile` is unknown, or `quantile_rate` is not in (0, 1].
    """

    shardable = True

    threshold: Tensor
    threshold_updates: Tensor
    lower_bound: Tensor
    """Where the selection of the next batch starts to look, in fixed-size mode. Changes no result; not saved."""

    RATE = 0.01

    def __init__(
        self,
        k: float,
        quantile: Literal["batch", "running"] = "batch",
        quantile_rate: Annotated[float, Gt(0), Le(1)] = 0.05,
        **sparse: Any,
    ):
        super().__init__(k=k, **sparse)
        self.quantile, self.quantile_rate = quantile, quantile_rate
        self.batch_rule = quantile == "batch"
        self.varying_size = None if self.batch_rule else "with quantile=running any number of latents may be active"
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("lower_bound", torch.zeros((), dtype=torch.float32), persistent=False)

    def with_k(self, k: float) -> Self:
        """Return this SAE with another k and `quantile=batch`: a running threshold is that of the trained k."""
        return self.convert_to(type(self), k=k, quantile="batch")

    def select(self, h: Pieces) -> SparseCode:
        batch_wise = self.training and (self.batch_rule or self.threshold_updates == 0)
        if batch_wise:
            return select_top_of_batch(h, self.current_k, self.lower_bound, self.signed)
        return select_above(h, self.threshold, self.signed)

    def activation_thresholds(self) -> Float[Tensor, " f"]:
        return self.threshold.expand(len(self.own_latents))

    @torch.no_grad()
    def observe(self, code: Code) -> None:
        if self.batch_rule or self.threshold_updates == 0:
            # This rate divides the exponential mean by 1 - (1 - RATE)^n, which removes the bias towards its start.
            self._update_threshold(code, lambda n: self.RATE / (1 - (1 - self.RATE) ** n))
        else:
            excess = mean_over_ranks(l0_per_row(code).float().mean()) / self.current_k - 1
            self.threshold *= 1 + self.quantile_rate * excess.clamp_max(1)
            self.threshold_updates += 1
        super().observe(code)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        if not self.batch_rule:
            return
        if i == 0:
            self.threshold.zero_()
            self.threshold_updates.zero_()
        was_training = self.training
        self.train()
        self._update_threshold(self.code(self.read(x)[0]), lambda n: 1 / n)
        self.train(was_training)

    def _update_threshold(self, code: Code, rate: Callable[[Tensor], Tensor]) -> None:
        """Move the threshold towards the smallest active value of a batch; do nothing if no latent is active.

        Args:
            code: the code of the batch.
            rate: maps the number of updates so far to the rate of this one.
        """
        smallest = min_over_ranks(smallest_active(code)).to(self.threshold)
        known = smallest < torch.inf
        self.threshold_updates += known
        weight = rate(self.threshold_updates.clamp_min(1).to(self.threshold)) * known
        self.threshold.lerp_(smallest.nan_to_num(posinf=0.0), weight)
