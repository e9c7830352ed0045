"""What is reported of a trained SAE: every name defined once, accumulated as totals over the held-out tokens.

Reconstruction, for activations x and reconstructions x_hat in raw units, over n rows, s sources and d dimensions
(sums run over rows, sources and dimensions; every source counts, but of a routed SAE the one that it chose, of a
transcoder those that it predicts):

    nmse               mean of ((x - x_hat) / (std_d x + 1e-5))², std_d unbiased, per row and source: the squared error
                       on the unit-std input, as the BatchTopK write-up plots it
    fvu                sum (x - x_hat)² / sum (x - mean x)², mean x per source and dimension over the whole data set
    cosine_similarity  mean over rows and sources of cos(x, x_hat)
    l0                 mean over rows of the number of active (non-zero) latents
    l0_std             its standard deviation over rows (population)
    dead_fraction      share of latents active on no evaluation token
    n_eval_tokens      n
    fvu_0, fvu_1, ...  fvu of each of these sources by itself, where there are several
    share_0, ...       share of the rows on which a routed SAE chose each source

Of a crosscoder on two models, latents_base_only, latents_shared, latents_tuned_only and latents_between count latents
by whose feature they are (see diffing.py); sources are the base model's, then the fine-tuned one's.

Downstream, next-token cross-entropy (nats) of the language model, mean over all predictions within rows; x is
replaced, at all sources but those that are input alone, at the positions that the SAE is judged on (`data.exclude_*`
positions keep their activation):

    ce_clean           nothing replaced
    ce_spliced         x replaced by x_hat; by a routed SAE at the source that it chose for the position, alone
    ce_zero, ce_mean   x replaced by 0, by the data set's mean activation
    ce_degradation     ce_spliced - ce_clean: positive is worse
    loss_recovered     (ce_zero - ce_spliced) / (ce_zero - ce_clean): 1 is perfect, 0 as bad as zero-ablation; missing
                       where that costs nothing, as where what is predicted belongs to another model
    kl                 mean KL(clean || spliced) of the next-token distributions, nats
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from sae_lab.ops.sparse import Code, fire_counts, l0_per_row
from sae_lab.parallel.collectives import mean_over_ranks, sum_over_ranks


def batch_fvu(x: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Tensor:
    """fvu of one batch, by itself: for training curves."""
    mean = mean_over_ranks(x.mean(dim=0))
    return sum_over_ranks((x - x_hat).float().square().sum()) / sum_over_ranks((x - mean).float().square().sum())


class ReconstructionMetrics(Metric):
    """The reconstruction metrics of this file's docstring, as float64 totals; distributed processes add theirs up."""

    full_state_update = False

    sum_x: Tensor
    covered_x: Tensor
    squared_norm: Tensor
    squared_error: Tensor
    normalised_error: Tensor
    cosine: Tensor
    n_covered: Tensor
    l0_sum: Tensor
    l0_squared: Tensor
    fires: Tensor
    n_rows: Tensor

    def __init__(self, n_latents: int):
        super().__init__()
        for name in ("sum_x", "covered_x", "squared_norm", "squared_error", "normalised_error", "cosine", "n_covered"):
            self.add_state(name, torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")  # grows to one a source
        for name in ("l0_sum", "l0_squared", "n_rows"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fires", torch.zeros(n_latents, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        x: Float[Tensor, "*row d"],
        x_hat: Float[Tensor, "*row d"],
        code: Code,
        covers: Bool[Tensor, "b s"] | None = None,
    ) -> None:
        """One batch; only the sources of a row where `covers` is True count (None: all)."""
        x = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        x, x_hat = x.float(), x_hat.reshape(x.shape).float()
        error, scale = (x - x_hat).double(), x.std(dim=-1, keepdim=True) + 1e-5
        weight = (torch.ones(x.shape[:2], device=x.device) if covers is None else covers).double()
        totals = {
            "sum_x": x.double().sum(dim=0),
            "covered_x": (weight.unsqueeze(-1) * x).sum(dim=0),
            "squared_norm": (weight * x.double().square().sum(dim=-1)).sum(dim=0),
            "squared_error": (weight * error.square().sum(dim=-1)).sum(dim=0),
            "normalised_error": (weight * (error / scale).square().mean(dim=-1)).sum(dim=0),
            "cosine": (weight * F.cosine_similarity(x, x_hat, dim=-1)).sum(dim=0),
            "n_covered": weight.sum(dim=0),
        }
        for name, value in totals.items():
            setattr(self, name, getattr(self, name) + value)
        l0 = l0_per_row(code).double()
        self.l0_sum += l0.sum()
        self.l0_squared += l0.square().sum()
        self.fires += fire_counts(code)
        self.n_rows += len(x)

    def mean_activation(self) -> Float[Tensor, "s d"]:
        return (self.sum_x / self.n_rows).float()

    def density(self) -> Float[Tensor, " f"]:
        """The share of rows on which each latent is active."""
        return self.fires / self.n_rows

    def compute(self) -> dict[str, float]:
        mean = self.sum_x / self.n_rows
        variance = self.squared_norm + (mean * (self.n_covered.unsqueeze(-1) * mean - 2 * self.covered_x)).sum(dim=-1)
        n, l0 = self.n_covered.sum(), self.l0_sum / self.n_rows
        values = {
            "nmse": self.normalised_error.sum() / n,
            "fvu": self.squared_error.sum() / variance.sum(),
            "l0": l0,
            "l0_std": (self.l0_squared / self.n_rows - l0.square()).clamp_min(0).sqrt(),
            "cosine_similarity": self.cosine.sum() / n,
            "dead_fraction": (self.fires == 0).double().mean(),
        }
        covered = self.n_covered.nonzero().flatten().tolist()
        if len(covered) > 1:
            values |= {f"fvu_{i}": self.squared_error[i] / variance[i] for i in covered}
        if ((self.n_covered > 0) & (self.n_covered < self.n_rows)).any():
            values |= {f"share_{i}": share for i, share in enumerate(self.n_covered / self.n_rows)}
        return {name: value.item() for name, value in values.items()} | {"n_eval_tokens": int(self.n_rows)}


def next_token_log_probs(logits: Float[Tensor, "n t v"]) -> Float[Tensor, "n t-1 v"]:
    """log p of every token after the first, in float32; the last position predicts nothing that is known."""
    return logits[:, :-1].float().log_softmax(dim=-1)


def cross_entropy(log_probs: Float[Tensor, "n t-1 v"], tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t-1"]:
    """-log p of what came next, nats."""
    return -log_probs.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


def kl_divergence(
    p: Float[Tensor, "n t-1 v"], clean: Float[Tensor, "n t-1 v"], spliced: Float[Tensor, "n t-1 v"]
) -> Float[Tensor, "n t-1"]:
    """KL(clean || spliced) of each prediction, nats, from log-probabilities and p = exp(clean).

    Many SAEs share p: taken anew for each, exp is 6/7 of this. A row at a time, for the vocabulary may be large.
    """
    rows = zip(p, clean, spliced, strict=True)
    return torch.stack([torch.linalg.vecdot(p_row, of_p - of_q) for p_row, of_p, of_q in rows])


class DownstreamMetrics(Metric):
    """The downstream metrics of this file's docstring, as float64 totals."""

    full_state_update = False

    n_predictions: Tensor

    TOTALS = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")

    def __init__(self) -> None:
        super().__init__()
        for name in (*self.TOTALS, "n_predictions"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **predictions: Float[Tensor, "n t-1"]) -> None:
        """One value per prediction, for each name of TOTALS."""
        for name in self.TOTALS:
            setattr(self, name, getattr(self, name) + predictions[name].double().sum())
        self.n_predictions += predictions["ce_clean"].numel()

    def compute(self) -> dict[str, float]:
        values = {name: (getattr(self, name) / self.n_predictions).item() for name in self.TOTALS}
        damage, reach = values["ce_spliced"] - values["ce_clean"], values["ce_zero"] - values["ce_clean"]
        values["ce_degradation"] = damage
        return values | {"loss_recovered": (values["ce_zero"] - values["ce_spliced"]) / reach} if reach else values


def l0_histogram(counts: Int[Tensor, " n"], bos: Bool[Tensor, " n"]) -> list[dict[str, Any]]:
    """Rows (l0, bos, other): how many tokens have that many active latents, BOS tokens told apart."""
    size = int(counts.max()) + 1
    at_bos, elsewhere = (torch.bincount(counts[mask], minlength=size).tolist() for mask in (bos, ~bos))
    return [{"l0": i, "bos": at_bos[i], "other": elsewhere[i]} for i in range(size)]
