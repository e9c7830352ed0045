"""Evaluation of SAEs on held-out text. They share the text and the clean passes over the language model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.columns import Columns
from sae_lab.activations.data import ActivationData
from sae_lab.evaluation import diffing
from sae_lab.evaluation.downstream import Replace, constant_ablation, spliced_logits, zero_ablation
from sae_lab.evaluation.metrics import (
    DownstreamMetrics,
    ReconstructionMetrics,
    cross_entropy,
    kl_divergence,
    l0_histogram,
    next_token_log_probs,
)
from sae_lab.lm.base import LanguageModel
from sae_lab.ops.sparse import Code, l0_per_row
from sae_lab.runtime.device import synchronized_time
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE


class Evaluation(NamedTuple):
    """Metrics by name, and the tables from which the figures are drawn."""

    metrics: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    rows_per_second: float
    """Speed of encoding and decoding, in rows per second. Measured while alternating with the other SAEs."""


class EvaluatedSAE:
    """One SAE under one activation rule, with its accumulated totals.

    Args:
        lm: the language model, at the sites of this SAE.
        training_rule: evaluate in `train()` mode, under the batch-wise rule.
        batch_size: rows that the SAE sees at once.
    """

    def __init__(self, sae: BaseSAE, lm: LanguageModel, training_rule: bool, batch_size: int):
        self.sae, self.lm, self.training_rule, self.batch_size = sae, lm, training_rule, batch_size
        self.device = next(sae.parameters()).device
        self.reconstruction = ReconstructionMetrics(sae.n_latents).to(self.device)
        self.downstream = DownstreamMetrics()
        self.l0: list[Tensor] = []
        self.n_rows, self.seconds = 0, 0.0

    def autoencode(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Code]]:
        """Yield (x, x_hat, code) for equal parts of x of about `batch_size` rows. Restores the SAE's mode."""
        before = self.sae.training
        self.sae.train(self.training_rule)
        try:
            for batch in x.to(self.device).tensor_split(max(1, round(len(x) / self.batch_size))):
                yield batch, *self._timed_autoencode(batch)
        finally:
            self.sae.train(before)

    def _timed_autoencode(self, x: Tensor) -> tuple[Tensor, Code]:
        start = synchronized_time(self.device)
        result = self.sae.autoencode(x)
        self.seconds += synchronized_time(self.device) - start
        self.n_rows += len(x)
        return result

    def reconstruct_rows(self, x: Tensor) -> None:
        """Add the reconstruction of x to the totals."""
        for batch, x_hat, code in self.autoencode(x):
            self.reconstruction.update(batch, x_hat, code, self.sae.predicted_mask(batch))
            self.l0.append(l0_per_row(code).cpu())

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return x_hat under this rule."""
        return torch.cat([x_hat for _, x_hat, _ in self.autoencode(x)])

    def metrics(self) -> dict[str, float]:
        """Compute all metrics from the totals."""
        return self.reconstruction.compute() | self.downstream.compute()

    def undefined(self) -> dict[str, str]:
        """Return the metrics that the data leave undefined, each with the reason."""
        return self.reconstruction.undefined() | self.downstream.undefined()


BySites = dict[tuple[str, ...], list[EvaluatedSAE]]
"""The SAEs to evaluate, by their sites."""


def evaluate(sae: BaseSAE, data: ActivationData) -> Evaluation:
    """Evaluate an SAE on held-out text: the metrics of metrics.py under the deployed rule.

    `metrics["train_mode"]` holds the same metrics under the training rule. `metrics["left_out"]` names the metrics that
    the data leave undefined, with the reason; there is no such key if there are none.
    """
    return evaluate_all({"": sae}, data)[""]


@torch.no_grad()
def evaluate_all(
    saes: Mapping[str, BaseSAE], data: ActivationData, lms: Sequence[LanguageModel] | None = None
) -> dict[str, Evaluation]:
    """Evaluate several SAEs with the same two passes over the language model, each to the bit as by itself.

    If there is less held-out text than `data.n_eval_tokens`, the metrics hold both numbers.

    The training rule sees batches of about the training size, made of whole text rows from all over the held-out text.
    The state and mode of the SAEs do not change.

    Args:
        lms: the language model of the data at the sites of each SAE, which are among those of the data; None: at all.
    """
    rows_at_once = max(data.lm_batch_rows, math.ceil(data.batch_size / data.seq_len))
    rows = data.held_out_rows(data.n_eval_tokens)
    batches = rows.split(rows_at_once)
    shorter = {"n_held_out_tokens": rows.numel(), "n_eval_tokens_wanted": data.n_eval_tokens}
    at = dict(zip(saes, lms or [data.lm] * len(saes), strict=True))
    deployed = {name: EvaluatedSAE(sae, at[name], False, data.batch_size) for name, sae in saes.items()}
    trained = {name: EvaluatedSAE(sae, at[name], True, data.batch_size) for name, sae in saes.items() if sae.batch_rule}
    subjects = group_by_sites([*deployed.values(), *trained.values()])
    bos = reconstruct_all(subjects, data, batches)
    splice_all(subjects, data, batches)
    evaluations = {}
    for name, subject in deployed.items():
        metrics: dict[str, Any] = subject.metrics()
        train_mode = trained[name].metrics() if name in trained else dict(metrics)
        tables = build_tables(subject, bos)
        if data.lm.models and not subject.sae.n_inputs:
            tables["relative_norm"] = diffing.latent_table(subject.sae.directions(), subject.reconstruction.density())
            metrics |= diffing.class_counts(tables["relative_norm"])
        metrics |= {"train_mode": train_mode}
        if left_out := trained.get(name, subject).undefined() | subject.undefined():
            metrics |= {"left_out": left_out}
        if len(rows) < data.n_eval_tokens // data.seq_len:
            metrics |= shorter
        evaluations[name] = Evaluation(metrics, tables, subject.n_rows / subject.seconds)
    return evaluations


def group_by_sites(subjects: list[EvaluatedSAE]) -> BySites:
    """Return the SAEs of each choice of sites."""
    groups: BySites = {}
    for subject in subjects:
        groups.setdefault(subject.lm.sites, []).append(subject)
    return groups


def reconstruct_all(subjects: BySites, data: ActivationData, batches: tuple[Tensor, ...]) -> Bool[Tensor, " n"]:
    """Run the first pass: reconstruction metrics and L0. Returns a mask of the BOS tokens among the n tokens.

    Raises:
        UserError: the activations are not finite, or every position is left out.
    """
    if not any(data.keep_mask(tokens).any() for tokens in batches):
        raise UserError("data.exclude_* leaves out every held-out token: raise data.n_eval_tokens.")
    bos = []
    for tokens in track(batches, "evaluating reconstruction"):
        keep, x = data.kept(tokens)
        for sites, group in subjects.items():
            own = Columns(data.lm.sites, sites)(x)
            for subject in group:
                subject.reconstruct_rows(own)
        bos.append(tokens[keep] == data.lm.bos_id)
    return torch.cat(bos)


def splice_all(subjects: BySites, data: ActivationData, batches: tuple[Tensor, ...]) -> None:
    """Run the second pass: cross-entropies with activations clean, set to zero or the mean, and replaced by x_hat."""
    means = {sites: constant_ablation(group[0].reconstruction.mean_activation()) for sites, group in subjects.items()}
    for tokens in track(batches, "evaluating cross-entropy"):
        activations = data.lm.activations(tokens)
        keep = data.keep_positions(tokens, activations)
        clean = Clean.run(data.lm, tokens)
        for sites, group in subjects.items():
            own = Columns(data.lm.sites, sites)(activations)
            splice_batch(group, tokens, keep, own, clean, means[sites])


class Clean(NamedTuple):
    """What the language model predicts of one batch without replaced activations."""

    log_p: Tensor
    p: Tensor
    ce: Tensor

    @classmethod
    def run(cls, lm: LanguageModel, tokens: Int[Tensor, "n t"]) -> "Clean":
        log_p = next_token_log_probs(lm.logits(tokens))
        return cls(log_p, log_p.exp(), cross_entropy(log_p, tokens.to(lm.device)))


def splice_batch(
    subjects: list[EvaluatedSAE],
    tokens: Int[Tensor, "n t"],
    keep: Bool[Tensor, "n t"],
    activations: Float[Tensor, "n t s d"],
    clean: Clean,
    mean: Replace,
) -> None:
    """Process one batch of `splice_all` for SAEs of the same sites. Those that predict the same share the ablations."""
    lm = subjects[0].lm
    rows, targets = activations[keep.to(activations.device)], tokens.to(lm.device)

    def log_probs(replace: Replace, predicted: Bool[Tensor, "#b s"] | None) -> Tensor:
        return next_token_log_probs(spliced_logits(lm, tokens, activations, keep, replace, predicted))

    def ablate(n_inputs: int) -> dict[str, Tensor]:
        predicted = (torch.arange(rows.shape[1]) >= n_inputs).unsqueeze(0)
        by = {"ce_zero": zero_ablation, "ce_mean": mean}
        return {name: cross_entropy(log_probs(replace, predicted), targets) for name, replace in by.items()}

    ablations = {n: ablate(n) for n in {subject.sae.n_inputs for subject in subjects}}
    for subject in subjects:
        spliced = log_probs(subject.reconstruct, subject.sae.predicted_mask(rows))
        own = {"ce_spliced": cross_entropy(spliced, targets), "kl": kl_divergence(clean.p, clean.log_p, spliced)}
        subject.downstream.to(lm.device).update(ce_clean=clean.ce, **ablations[subject.sae.n_inputs], **own)


def build_tables(subject: EvaluatedSAE, bos: Bool[Tensor, " n"]) -> dict[str, pd.DataFrame]:
    """Build two tables: the number of tokens by L0 (BOS apart), and the density of each latent."""
    density = subject.reconstruction.density().cpu().numpy()
    return {
        "l0_per_token": pd.DataFrame(l0_histogram(torch.cat(subject.l0), bos)),
        "latent_density": pd.DataFrame({"latent": range(len(density)), "density": density}),
    }
