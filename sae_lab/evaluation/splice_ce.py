"""What replacing activations by x_hat costs the language model, on the same text whenever it is asked."""

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.activations.passes import batch_sizes
from sae_lab.evaluation.downstream import Replace, spliced_predictions, zero_ablation
from sae_lab.evaluation.metrics import cross_entropy, to_log_probs
from sae_lab.lm.predictions import Predictions, logit_slices
from sae_lab.parallel.collectives import sum_over_ranks
from sae_lab.parallel.mesh import data_axis
from sae_lab.saes.base import BaseSAE


class SpliceCost:
    """`ce_degradation` and `loss_recovered` of evaluation/metrics.py, during training.

    The cross-entropies without an SAE are computed once. Several processes share the text.

    Args:
        data: the data at the sites of the SAE.
        n_tokens: held-out tokens.
    """

    def __init__(self, data: ActivationData, n_tokens: int):
        self.data = data
        self.zero: float | None = None
        self.parts = data.held_out(n_tokens).parts[data_axis().index :: data_axis().size]

    def __call__(self, sae: BaseSAE) -> dict[str, float]:
        """Return the metrics of an SAE in its present mode; no `loss_recovered` where zero-ablation costs nothing."""
        spliced, cost = self.mean_ce(sae), self.ce_zero(sae) - self.ce_clean
        metrics = {"ce_degradation": spliced - self.ce_clean}
        return metrics | ({"loss_recovered": 1 - metrics["ce_degradation"] / cost} if cost else {})

    @cached_property
    def ce_clean(self) -> float:
        return self.mean_ce(None)

    def ce_zero(self, sae: BaseSAE) -> float:
        """Return the cross-entropy with zeros at the sources that an SAE predicts. They stay the same in a run."""
        if self.zero is None:
            self.zero = self.mean_ce(sae, zero_ablation)
        return self.zero

    @torch.no_grad()
    def mean_ce(self, sae: BaseSAE | None, replace: Replace | None = None) -> float:
        """Return the cross-entropy with x_hat of an SAE, or `replace(x)`, in place of x; None: nothing is replaced."""
        device = self.data.lm.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for tokens, rows in self.parts:
            with self.data.lm_lock:  # the thread that computes the next block uses the model as well
                total += self.sum_of_ce(self.predictions(tokens, rows, sae, replace), tokens.to(device))
        total = sum_over_ranks(total)
        return (total[0] / total[1]).item()

    def predictions(
        self, tokens: Int[Tensor, "n t"], rows: list[int], sae: BaseSAE | None, replace: Replace | None
    ) -> Predictions:
        lm = self.data.lm
        if sae is None:
            return lm.predictions(tokens)
        activations = lm.activations(tokens)
        keep = self.data.positions.mask_with(tokens, activations)
        x = activations[keep.to(activations.device)]
        sizes, device = batch_sizes(keep, rows), next(sae.parameters()).device

        def reconstruct(x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
            return torch.cat([sae.autoencode(batch)[0] for batch in x.to(device).split(sizes)])

        chosen = sae.predicted_mask(x.to(device)) if sae.n_inputs or replace is None else None
        return spliced_predictions(lm, tokens, activations, keep, replace or reconstruct, chosen)

    def sum_of_ce(self, predictions: Predictions, tokens: Int[Tensor, "n t"]) -> Float[Tensor, " 2"]:
        """Return the sum of the cross-entropies of all predictions within rows, and their number."""
        targets, total = tokens.roll(-1, dims=1), torch.zeros(2, dtype=torch.float64, device=tokens.device)
        for piece in logit_slices(tokens, self.data.lm.vocab_size):
            ce = cross_entropy(to_log_probs(predictions.logits(*piece)), targets[piece])
            ce = ce[:, : -1 if piece[1].stop == tokens.shape[1] else None]  # the last token of a row predicts none
            total[0] += ce.double().sum()
            total[1] += ce.numel()
        return total
