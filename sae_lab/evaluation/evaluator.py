"""Evaluation of SAEs on held-out text. They share the text and the clean passes over the language model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.columns import Columns
from sae_lab.activations.data import ActivationData
from sae_lab.activations.held_out import HeldOut
from sae_lab.activations.passes import TextPass, batch_sizes
from sae_lab.activations.stream import StreamData
from sae_lab.evaluation import diffing
from sae_lab.evaluation.downstream import Replace, constant_ablation, spliced_predictions, zero_ablation
from sae_lab.evaluation.metrics import (
    ACTIVATION_EDGES,
    DownstreamMetrics,
    ReconstructionMetrics,
    RowMetric,
    activation_counts,
    activation_histogram,
    cross_entropy,
    kl_divergence,
    l0_histogram,
    own_metrics,
    to_log_probs,
)
from sae_lab.lm import predictions as of_lm
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.predictions import Predictions, logit_slices
from sae_lab.ops.sparse import Code, l0_per_row
from sae_lab.parallel.shards import sum_over_shards
from sae_lab.runtime.device import synchronized_time
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Metrics by name, and the tables from which the figures are drawn."""

    metrics: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    rows_per_second: float
    """Speed of encoding and decoding, in rows per second. Measured while alternating with the other SAEs."""


class EvaluatedSAE:
    """One SAE under one activation rule, with its accumulated totals.

    Args:
        data: the data at the sites of this SAE.
        training_rule: evaluate in `train()` mode, under the batch-wise rule.
        added: row metrics of one's own; see `ReconstructionMetrics`.
    """

    def __init__(
        self, sae: BaseSAE, data: StreamData, training_rule: bool, added: Mapping[str, RowMetric] = MappingProxyType({})
    ):
        self.sae, self.data, self.training_rule = sae, data, training_rule
        self.device = next(sae.parameters()).device
        self.reconstruction = ReconstructionMetrics(len(sae.own_latents), added).to(self.device)
        self.downstream = DownstreamMetrics()
        self.l0: list[Tensor] = []
        self.entries = torch.zeros(len(ACTIVATION_EDGES) - 1, dtype=torch.long, device=self.device)
        self.n_rows, self.seconds = 0, 0.0

    def autoencode(self, x: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor, Code]]:
        """Yield (x, x_hat, code) for batches of the given sizes. Restores the SAE's mode."""
        before = self.sae.training
        self.sae.train(self.training_rule)
        try:
            for batch in x.to(self.device).split(sizes):
                yield batch, *self._timed_autoencode(batch)
        finally:
            self.sae.train(before)

    def _timed_autoencode(self, x: Tensor) -> tuple[Tensor, Code]:
        start = synchronized_time(self.device)
        result = self.sae.autoencode(x)
        self.seconds += synchronized_time(self.device) - start
        self.n_rows += len(x)
        return result

    def reconstruct_rows(self, x: Tensor, sizes: list[int]) -> None:
        """Add the reconstruction of x, in batches of the given sizes, to the totals."""
        for batch, x_hat, code in self.autoencode(x, sizes):
            self.reconstruction.update(batch, x_hat, code, self.sae.predicted_mask(batch))
            self.l0.append(l0_per_row(code).cpu())
            self.entries += activation_counts(code)

    def reconstruct(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Return x_hat under this rule, from batches of the given sizes."""
        return torch.cat([x_hat for _, x_hat, _ in self.autoencode(x, sizes)])

    def metrics(self) -> dict[str, float]:
        """Compute all metrics from the totals."""
        downstream = self.downstream.compute() if self.downstream.update_called else {}
        return self.reconstruction.compute() | downstream

    def undefined(self) -> dict[str, str]:
        """Return the metrics that the data leave undefined, each with the reason."""
        return self.reconstruction.undefined() | self.downstream.undefined()


BySites = dict[tuple[str, ...], list[EvaluatedSAE]]
"""The SAEs to evaluate, by their sites."""


def evaluate(sae: BaseSAE, data: StreamData, added: Mapping[str, RowMetric] = MappingProxyType({})) -> Evaluation:
    """Evaluate an SAE on held-out text: the metrics of metrics.py under the deployed rule.

    `metrics["train_mode"]` holds the same metrics under the training rule. `metrics["left_out"]` names the metrics that
    the data leave undefined, with the reason; there is no such key if there are none.
    """
    return evaluate_all({"": sae}, data, added=[added])[""]


@torch.no_grad()
def evaluate_all(
    saes: Mapping[str, BaseSAE],
    data: StreamData,
    views: Sequence[StreamData] | None = None,
    added: Sequence[Mapping[str, RowMetric]] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate several SAEs with the same two passes over the language model, each to the bit as by itself.

    If there is less held-out text than `data.n_eval_tokens`, the metrics hold both numbers.

    The training rule sees batches of about the training size, made of whole text rows from all over the held-out text.
    The state and mode of the SAEs do not change.

    Args:
        views: the data at the sites of each SAE, which are among those of `data`; None: at all.
        added: row metrics of one's own, for each SAE; None: those of ROW_METRICS alone.
    """
    held_out = data.held_out(data.n_eval_tokens)
    found = f"{held_out.n_tokens:,} held-out tokens"
    if held_out.too_few:
        log.info("evaluating on %s, all there are (data.n_eval_tokens=%d)", found, data.n_eval_tokens)
    else:
        log.info("evaluating on %s (data.n_eval_tokens)", found)
    shorter = {"n_held_out_tokens": held_out.n_tokens, "n_eval_tokens_wanted": data.n_eval_tokens}
    at = dict(zip(saes, views or [data] * len(saes), strict=True))
    of = dict(zip(saes, added or [{}] * len(saes), strict=True))
    deployed = {name: EvaluatedSAE(sae, at[name], False, of[name]) for name, sae in saes.items()}
    trained = {name: EvaluatedSAE(sae, at[name], True, of[name]) for name, sae in saes.items() if sae.batch_rule}
    subjects = group_by_sites([*deployed.values(), *trained.values()])
    bos = reconstruct_all(subjects, data, held_out)
    if isinstance(data, ActivationData):
        splice_all(subjects, data, held_out.parts)
    evaluations = {}
    for name, subject in deployed.items():
        metrics: dict[str, Any] = subject.metrics()
        train_mode = trained[name].metrics() if name in trained else dict(metrics)
        tables = build_tables(subject, bos)
        if data.models and not subject.sae.n_inputs:
            tables["relative_norm"] = diffing.latent_table(subject.sae.directions(), subject.reconstruction.density())
            metrics |= diffing.class_counts(tables["relative_norm"])
        metrics |= {"train_mode": train_mode}
        if left_out := trained.get(name, subject).undefined() | subject.undefined():
            metrics |= {"left_out": left_out}
        if own := own_metrics(subject.reconstruction.row_metrics):
            metrics |= {"own_metrics": own}
        if held_out.too_few:
            metrics |= shorter
        evaluations[name] = Evaluation(metrics, tables, subject.n_rows / subject.seconds)
    return evaluations


def group_by_sites(subjects: list[EvaluatedSAE]) -> BySites:
    """Return the SAEs of each choice of sites."""
    groups: BySites = {}
    for subject in subjects:
        groups.setdefault(subject.data.sites, []).append(subject)
    return groups


def reconstruct_all(subjects: BySites, data: StreamData, held_out: HeldOut) -> Bool[Tensor, " n"]:
    """Run the first pass: reconstruction metrics and L0. Returns a mask of the BOS tokens among the n tokens.

    Raises:
        UserError: the activations are not finite.
    """
    bos = []
    for part in track(held_out.parts, "evaluating reconstruction"):
        rows = held_out.read(part)
        for sites, group in subjects.items():
            own = Columns(data.sites, sites)(rows.x)
            for subject in group:
                subject.reconstruct_rows(own, rows.sizes)
        bos.append(rows.at_bos)
    return torch.cat(bos)


class Spliced(NamedTuple):
    """What the language model predicts of one pass with x_hat of an SAE, and with the ablations in its place."""

    subject: EvaluatedSAE
    predictions: Predictions
    ablated: dict[str, Predictions]
    """Shared by SAEs of the same sites that predict the same of them."""


def splice_all(subjects: BySites, data: ActivationData, passes: Sequence[TextPass]) -> None:
    """Run the second pass: cross-entropies with activations clean, set to zero or the mean, and replaced by x_hat.

    Each SAE sees batches as in the first pass. Then logits are computed for slices of the predictions of as many SAEs
    as have SLICE_BYTES of hidden states.
    """
    means = {sites: constant_ablation(group[0].reconstruction.mean_activation()) for sites, group in subjects.items()}
    for tokens, rows in track(passes, "evaluating cross-entropy"):
        activations = data.lm.activations(tokens)
        keep = data.positions.mask_with(tokens, activations)
        for part in group_by_kind(subjects):
            clean = model_of(next(iter(part.values()))).predictions(tokens)
            spliced = (
                one
                for sites, group in part.items()
                for one in splice(group, tokens, keep, Columns(data.sites, sites)(activations), rows, means[sites])
            )
            at_once = max(1, of_lm.SLICE_BYTES // (clean.nbytes or activations.nbytes))
            while some := list(islice(spliced, at_once)):
                for piece in logit_slices(tokens, data.lm.vocab_size):
                    score(some, clean, tokens.to(data.lm.device), piece)


def group_by_kind(subjects: BySites) -> list[BySites]:
    """Return the SAEs in parts, each of which shares the clean predictions: from hidden states, or from whole rows."""
    parts: dict[bool, BySites] = {}
    for sites, group in subjects.items():
        parts.setdefault(model_of(group).is_split, {})[sites] = group
    return list(parts.values())


def model_of(subjects: Sequence[EvaluatedSAE]) -> LanguageModel:
    """Return the language model at the sites of some SAEs, which are the same."""
    assert isinstance(subjects[0].data, ActivationData)
    return subjects[0].data.lm


def splice(
    subjects: list[EvaluatedSAE],
    tokens: Int[Tensor, "n t"],
    keep: Bool[Tensor, "n t"],
    activations: Float[Tensor, "n t s d"],
    rows_of_batches: list[int],
    mean: Replace,
) -> Iterator[Spliced]:
    """Run the language model with x_hat of each SAE. The SAEs have the same sites."""
    rows, sizes = activations[keep.to(activations.device)], batch_sizes(keep, rows_of_batches)
    run = partial(spliced_predictions, model_of(subjects), tokens, activations, keep)
    ablated: dict[int, dict[str, Predictions]] = {}
    for n in {subject.sae.n_inputs for subject in subjects}:
        predicted = (torch.arange(rows.shape[1]) >= n).unsqueeze(0)
        ablated[n] = {"ce_zero": run(zero_ablation, predicted), "ce_mean": run(mean, predicted)}
    for subject in subjects:
        predictions = run(partial(subject.reconstruct, sizes=sizes), subject.sae.predicted_mask(rows))
        yield Spliced(subject, predictions, ablated[subject.sae.n_inputs])


def score(
    spliced: Sequence[Spliced], clean: Predictions, tokens: Int[Tensor, "n t"], piece: tuple[slice, slice]
) -> None:
    """Add the predictions in one slice of rows and positions to the totals of each SAE.

    At most four float32 copies of a slice's logits exist at once.
    """
    targets = tokens.roll(-1, dims=1)[piece]
    has_target = slice(None, -1 if piece[1].stop == tokens.shape[1] else None)  # the last token of a row predicts none

    def log_probs(predictions: Predictions) -> Float[Tensor, "r p v"]:
        return to_log_probs(predictions.logits(*piece))

    def ce(log_p: Float[Tensor, "r p v"]) -> Float[Tensor, "r q"]:
        return cross_entropy(log_p, targets)[:, has_target]

    def ce_and_kl(predictions: Predictions) -> dict[str, Float[Tensor, "r q"]]:
        log_q = log_probs(predictions)
        return {"ce_spliced": ce(log_q), "kl": kl_divergence(p, log_p, log_q)[:, has_target]}

    shared = {id(one.ablated): one.ablated for one in spliced}
    ablations = {key: {name: ce(log_probs(x)) for name, x in by.items()} for key, by in shared.items()}
    log_p = log_probs(clean)
    p, ce_clean = log_p.exp(), ce(log_p)
    for one in spliced:
        own = ablations[id(one.ablated)] | ce_and_kl(one.predictions)
        one.subject.downstream.to(tokens.device).update(ce_clean=ce_clean, **own)


def build_tables(subject: EvaluatedSAE, bos: Bool[Tensor, " n"]) -> dict[str, pd.DataFrame]:
    """Build three tables: numbers of tokens by L0 (BOS apart), densities of latents, active entries by size."""
    density = subject.reconstruction.density().cpu().numpy()
    entries = sum_over_shards(subject.entries).cpu()
    return {
        "l0_per_token": pd.DataFrame(l0_histogram(torch.cat(subject.l0), bos)),
        "latent_density": pd.DataFrame({"latent": range(len(density)), "density": density}),
        "activations": pd.DataFrame(activation_histogram(entries), columns=["log2", "entries"]),
    }
