"""The metrics of a trained SAE, defined here and accumulated as totals over the held-out tokens.

**Reconstruction.** x and x_hat are activations and reconstructions in raw units, over n rows, s sources and d
dimensions. Sums and means are over rows, sources and dimensions. All sources count, except that a routed SAE is judged
on the source that it chose for each row, and a transcoder on the sources that it predicts.

    nmse               mean of ((x - x_hat) / (std_d x + 1e-5))², with the unbiased std_d of each row and source: the
                       squared error on inputs of unit standard deviation, as in the BatchTopK write-up
    fvu                sum (x - x_hat)² / sum (x - mean x)², with the mean per source and dimension over the data set
    cosine_similarity  mean over rows and sources of cos(x, x_hat)
    l0                 mean over rows of the number of active (non-zero) latents
    l0_std             standard deviation of that number over rows (population)
    dead_fraction      share of the latents that are active on no evaluation token
    n_eval_tokens      n
    fvu_0, fvu_1, ...  fvu of each source that counts, if there are several
    share_0, ...       share of the rows for which a routed SAE chose each source

`ROW_METRICS` adds metrics that are means over rows and sources; `@metric` puts a function of one's own there.
`own_metrics` in metrics.json names those. For a crosscoder on two models, latents_base_only,
latents_shared, latents_tuned_only and latents_between count latents by the model to which they belong (diffing.py).

**Downstream.** Next-token cross-entropies of the language model in nats, averaged over all predictions within rows.
Activations are replaced at the positions on which the SAE is judged; positions that `data.exclude_*` leaves out keep
theirs.

    ce_clean           nothing replaced
    ce_spliced         x replaced by x_hat at the sources that count
    ce_zero, ce_mean   x replaced by 0, by the mean activation of the data set, at all sources but a transcoder's inputs
    ce_degradation     ce_spliced - ce_clean: positive is worse
    loss_recovered     (ce_zero - ce_spliced) / (ce_zero - ce_clean): 1 is perfect, 0 is as bad as zero-ablation.
                       Undefined if zero-ablation costs nothing, for example if the target belongs to another model
    kl                 mean KL(clean || spliced) of the next-token distributions, in nats

**Undefined metrics.** What the data leave undefined, such as the fvu of rows that are all the same, is left out, never
NaN: `undefined()` names it with the reason.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from sae_lab.ops.sparse import Code, SparseCode, fire_counts, l0_per_row
from sae_lab.parallel.collectives import mean_over_ranks, sum_over_ranks
from sae_lab.parallel.mesh import data_axis
from sae_lab.parallel.shards import concatenate_shards, mean_over_shards
from sae_lab.runtime.errors import UserError

CONSTANT = 1e-13
"""Ratio of sum (x - mean x)² to sum x² up to which rows count as the same: what rounding leaves of it is smaller."""
SAME_ROWS = "the held-out activations are the same in every row"


def batch_fvu(x: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Tensor:
    """Compute the fvu of one batch, for training curves; NaN if all rows are the same."""
    mean = mean_over_ranks(x.mean(dim=0))
    variance = sum_over_ranks((x - mean).float().square().sum())
    constant = variance <= CONSTANT * sum_over_ranks(x.float().square().sum())
    return (sum_over_ranks((x - x_hat).float().square().sum()) / variance).masked_fill(constant, torch.nan)


def nmse(x: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
    """Compute mean_d ((x - x_hat) / (std_d x + 1e-5))² of each row and source."""
    correction = min(1, x.shape[-1] - 1)  # a width of 1 has no unbiased std, and no nmse: see `undefined`
    error, scale = (x - x_hat).double(), x.std(dim=-1, correction=correction, keepdim=True) + 1e-5
    return (error / scale).square().mean(dim=-1)


def cosine_similarity(x: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
    """Compute cos(x, x_hat) of each row and source."""
    return F.cosine_similarity(x, x_hat, dim=-1)


RowMetric: TypeAlias = Callable[[Float[Tensor, "b s d"], Float[Tensor, "b s d"]], Float[Tensor, "b s"]]

ROW_METRICS: dict[str, RowMetric] = {"nmse": nmse, "cosine_similarity": cosine_similarity}
"""Functions of x and x_hat (raw units, float32) that return one value per row and source. The mean over the rows and
sources that count is reported under the key. `metric` adds one, `remove_metric` removes it."""

BUILT_IN = frozenset(ROW_METRICS)
OTHERS = re.compile(
    r"fvu(_\d+)?|share_\d+|l0(_std)?|dead_fraction|n_\w+|ce_\w+|kl|loss_recovered|latents_\w+|train_mode|d_in"
)
"""Names of metrics that are no means over rows, and of the other numbers in metrics.json."""


def metric(function: RowMetric) -> RowMetric:
    """Report the mean of a function's values as a metric of its name, from then on in this process.

        @metric
        def max_error(x, x_hat):
            return (x - x_hat).abs().amax(dim=-1)

    Args:
        function: takes x and x_hat (b, s, d) in raw units, returns (b, s); see ROW_METRICS.

    Raises:
        UserError: the name is that of another metric.
    """
    check_name(name := function.__name__)
    ROW_METRICS[name] = function
    return function


def remove_metric(name: str) -> None:
    """Stop reporting a metric that `metric` added.

    Raises:
        UserError: there is no such metric of one's own.
    """
    if name not in (own := own_metrics(ROW_METRICS)):
        raise UserError(f"there is no metric {name!r} to remove, only {', '.join(own) or 'those of this library'}.")
    del ROW_METRICS[name]


def check_name(name: str) -> None:
    """Raise a UserError if a metric of one's own has the name of a metric or a number of metrics.json."""
    if name in BUILT_IN or OTHERS.fullmatch(name) or not name.isidentifier():
        raise UserError(f"a metric cannot be called {name}, which metrics.json has or cannot hold: rename it.")


def own_metrics(names: Iterable[str]) -> list[str]:
    """Return those of the names of row metrics that are not of this file."""
    return sorted(set(names) - BUILT_IN)


ORDER = ("nmse", "fvu", "l0", "l0_std", "cosine_similarity", "dead_fraction")
"""Order of the first names in metrics.json."""


def over_rows() -> dict[str, Any]:
    """Return the arguments of a Metric whose states are summed over the ranks with other rows."""
    return {"process_group": data_axis().group, "sync_on_compute": data_axis().size > 1}


class ReconstructionMetrics(Metric):
    """The reconstruction metrics of this module, accumulated as float64 totals that are summed over processes.

    Args:
        n_latents: f; for a sharded SAE, the number of latents that this rank holds.
        added: row metrics besides those that are in ROW_METRICS when this object is constructed.
    """

    full_state_update = False

    sum_x: Tensor
    predicted_x: Tensor
    squared_norm: Tensor
    squared_error: Tensor
    n_predicted: Tensor
    l0_sum: Tensor
    l0_squared: Tensor
    fires: Tensor
    n_rows: Tensor

    def __init__(self, n_latents: int, added: Mapping[str, RowMetric] = MappingProxyType({})):
        super().__init__(**over_rows())
        self.row_metrics = dict(sorted({**ROW_METRICS, **added}.items()))  # ranks add their states up in this order
        per_source = ("sum_x", "predicted_x", "squared_norm", "squared_error", "n_predicted")
        for name in (*per_source, *map(row_total, self.row_metrics)):
            self.add_state(name, torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")  # updates make it (s, ...)
        for name in ("l0_sum", "l0_squared", "n_rows"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fires", torch.zeros(n_latents, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        x: Float[Tensor, "*row d"],
        x_hat: Float[Tensor, "*row d"],
        code: Code,
        predicted: Bool[Tensor, "b s"] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            predicted: the sources of each row that count; None: all.
        """
        x = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        x, x_hat = x.float(), x_hat.reshape(x.shape).float()
        error = (x - x_hat).double()
        weight = (torch.ones(x.shape[:2], device=x.device) if predicted is None else predicted).double()
        totals = {
            "sum_x": x.double().sum(dim=0),
            "predicted_x": (weight.unsqueeze(-1) * x).sum(dim=0),
            "squared_norm": (weight * x.double().square().sum(dim=-1)).sum(dim=0),
            "squared_error": (weight * error.square().sum(dim=-1)).sum(dim=0),
            "n_predicted": weight.sum(dim=0),
        }
        for name, metric in self.row_metrics.items():
            values = metric(x, x_hat)
            if getattr(values, "shape", None) != weight.shape:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise UserError(
                    f"the metric {name} must return shape (b, s) = {tuple(weight.shape)}, not {got}: give a tensor "
                    f"of one value per row and source, or take it out (remove_metric({name!r}) in Python)."
                )
            totals[row_total(name)] = (weight * values).sum(dim=0)
        for name, value in totals.items():
            setattr(self, name, getattr(self, name) + value)
        l0 = l0_per_row(code).double()
        self.l0_sum += l0.sum()
        self.l0_squared += l0.square().sum()
        self.fires += fire_counts(code)
        self.n_rows += len(x)

    def mean_activation(self) -> Float[Tensor, "s d"]:
        """Return the mean of x over all rows."""
        return (self.sum_x / self.n_rows).float()

    def density(self) -> Float[Tensor, " f"]:
        """Return the share of rows on which each latent is active, of all shards."""
        return concatenate_shards(self.fires) / self.n_rows

    def compute(self) -> dict[str, float]:
        """Return the metrics by name."""
        variance = self.variance()
        l0 = self.l0_sum / self.n_rows
        values = {name: getattr(self, row_total(name)).sum() / self.n_predicted.sum() for name in self.row_metrics}
        values |= {
            "fvu": self.squared_error.sum() / variance.sum(),
            "l0": l0,
            "l0_std": (self.l0_squared / self.n_rows - l0.square()).clamp_min(0).sqrt(),
            "dead_fraction": mean_over_shards((self.fires == 0).double().mean()),
        }
        values = {name: values[name] for name in (*ORDER, *values) if name in values}
        values |= {f"fvu_{i}": self.squared_error[i] / variance[i] for i in self.compared_sources()}
        if ((self.n_predicted > 0) & (self.n_predicted < self.n_rows)).any():
            values |= {f"share_{i}": share for i, share in enumerate(self.n_predicted / self.n_rows)}
        undefined = self.undefined()
        defined = {name: value.item() for name, value in values.items() if name not in undefined}
        return defined | {"n_eval_tokens": int(self.n_rows)}

    def variance(self) -> Float[Tensor, " s"]:
        """Return sum (x - mean x)² of each source over the rows on which it counts."""
        mean = self.sum_x / self.n_rows
        centering = mean * (self.n_predicted.unsqueeze(-1) * mean - 2 * self.predicted_x)
        return self.squared_norm + centering.sum(dim=-1)

    def undefined(self) -> dict[str, str]:
        """Return the metrics that these rows leave undefined, each with the reason."""
        variance, scale = self.variance(), CONSTANT * self.squared_norm
        reasons = {}
        if self.sum_x.shape[-1] == 1:
            reasons["nmse"] = "activations of width 1 have no standard deviation"
        if variance.sum() <= scale.sum():
            reasons["fvu"] = SAME_ROWS
        return reasons | {f"fvu_{i}": SAME_ROWS for i in self.compared_sources() if variance[i] <= scale[i]}

    def compared_sources(self) -> list[int]:
        """Return the sources that have an fvu of their own: those that count, if there are several."""
        predicted = self.n_predicted.nonzero().flatten().tolist()
        return predicted if len(predicted) > 1 else []


def row_total(name: str) -> str:
    """Return the name of the state that holds the total of a row metric."""
    return f"row_{name}"


def to_log_probs(logits: Float[Tensor, "r p v"]) -> Float[Tensor, "r p v"]:
    """Return log-probabilities in float32."""
    return logits.float().log_softmax(dim=-1)


def cross_entropy(log_probs: Float[Tensor, "r p v"], targets: Int[Tensor, "r p"]) -> Float[Tensor, "r p"]:
    """Return -log p of each target, in nats."""
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl_divergence(
    p: Float[Tensor, "r p v"], clean: Float[Tensor, "r p v"], spliced: Float[Tensor, "r p v"]
) -> Float[Tensor, "r p"]:
    """Compute KL(clean || spliced) of each prediction, in nats, from log-probabilities.

    Computed row by row, because the vocabulary may be large.

    Args:
        p: exp(clean). An argument because many SAEs share it: computing it here would take 6/7 of the time.
    """
    rows = zip(p, clean, spliced, strict=True)
    return torch.stack([torch.linalg.vecdot(p_row, log_p - log_q) for p_row, log_p, log_q in rows])


class DownstreamMetrics(Metric):
    """The downstream metrics of this module, accumulated as float64 totals."""

    full_state_update = False

    n_predictions: Tensor
    ce_clean: Tensor
    ce_zero: Tensor

    TOTALS = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")

    def __init__(self) -> None:
        super().__init__(**over_rows())
        for name in (*self.TOTALS, "n_predictions"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **predictions: Float[Tensor, "r p"]) -> None:
        """Add some predictions: one value per prediction for each name in TOTALS."""
        for name in self.TOTALS:
            setattr(self, name, getattr(self, name) + predictions[name].double().sum())
        self.n_predictions += predictions["ce_clean"].numel()

    def compute(self) -> dict[str, float]:
        """Return the metrics by name."""
        values = {name: (getattr(self, name) / self.n_predictions).item() for name in self.TOTALS}
        values["ce_degradation"] = values["ce_spliced"] - values["ce_clean"]
        if not self.undefined():
            cost = values["ce_zero"] - values["ce_clean"]
            values["loss_recovered"] = (values["ce_zero"] - values["ce_spliced"]) / cost
        return values

    def undefined(self) -> dict[str, str]:
        """Return the metrics that these predictions leave undefined, each with the reason."""
        if not self.n_predictions:
            return dict.fromkeys((*self.TOTALS, "ce_degradation", "loss_recovered"), "there is no language model")
        free = self.ce_zero / self.n_predictions == self.ce_clean / self.n_predictions
        return {"loss_recovered": "setting the activations to zero does not change the cross-entropy"} if free else {}


ACTIVATION_EDGES = np.arange(-64, 65) / 4
"""Edges of the bins of log2 |z|, quarters of an octave from 2^-16 to 2^16; the outer bins take what is beyond."""


def activation_counts(code: Code) -> Int[Tensor, " n"]:
    """Count the active entries of a code by the bin of their |z|."""
    z = code.values if isinstance(code, SparseCode) else code[code != 0]
    bins = (4 * z[z != 0].abs().double().log2()).floor().long() + 64
    return torch.bincount(bins.clamp(0, 127), minlength=128)


def activation_histogram(counts: Int[Tensor, " n"]) -> list[dict[str, Any]]:
    """Return rows (log2, entries) of the bins from the first to the last that is not empty; log2 is the centre."""
    found = counts.nonzero().flatten().tolist() or [0, -1]
    centres = (ACTIVATION_EDGES[:-1] + ACTIVATION_EDGES[1:]) / 2
    return [{"log2": float(centres[i]), "entries": int(counts[i])} for i in range(found[0], found[-1] + 1)]


def l0_histogram(counts: Int[Tensor, " n"], bos: Bool[Tensor, " n"]) -> list[dict[str, Any]]:
    """Count BOS tokens and other tokens by L0. Returns rows (l0, bos, other)."""
    size = int(counts.max()) + 1
    at_bos, elsewhere = (torch.bincount(counts[mask], minlength=size).tolist() for mask in (bos, ~bos))
    return [{"l0": i, "bos": at_bos[i], "other": elsewhere[i]} for i in range(size)]
