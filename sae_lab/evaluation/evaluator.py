"""Evaluation of SAEs on held-out text. SAEs of the same sites share both passes over the language model."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

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
        training_rule: evaluate in `train()` mode, under the batch-wise rule.
        batch_size: rows that the SAE sees at once.
    """

    def __init__(self, sae: BaseSAE, training_rule: bool, batch_size: int):
        self.sae, self.training_rule, self.batch_size = sae, training_rule, batch_size
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

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return x_hat under this rule."""
        return torch.cat([x_hat for _, x_hat, _ in self.autoencode(x)])

    def metrics(self) -> dict[str, float]:
        """Compute all metrics from the totals."""
        return self.reconstruction.compute() | self.downstream.compute()

    def undefined(self) -> dict[str, str]:
        """Return the metrics that the data leave undefined, each with the reason."""
        return self.reconstruction.undefined() | self.downstream.undefined()


def evaluate(sae: BaseSAE, data: ActivationData) -> Evaluation:
    """Evaluate an SAE on held-out text: the metrics of metrics.py under the deployed rule.

    `metrics["train_mode"]` holds the same metrics under the training rule. `metrics["left_out"]` names the metrics that
    the data leave undefined, with the reason; there is no such key if there are none.
    """
    return evaluate_all({"": sae}, data)[""]


@torch.no_grad()
def evaluate_all(saes: Mapping[str, BaseSAE], data: ActivationData) -> dict[str, Evaluation]:
    """Evaluate several SAEs of the same sites with the same two passes over the language model.

    If there is less held-out text than `data.n_eval_tokens`, the metrics hold both numbers.

    The training rule sees batches of about the training size, made of whole text rows from all over the held-out text.
    The state and mode of the SAEs do not change.
    """
    rows_at_once = max(data.lm_batch_rows, math.ceil(data.batch_size / data.seq_len))
    rows = data.held_out_rows(data.n_eval_tokens)
    batches = rows.split(rows_at_once)
    shorter = {"n_held_out_tokens": rows.numel(), "n_eval_tokens_wanted": data.n_eval_tokens}
    deployed = {name: EvaluatedSAE(sae, False, data.batch_size) for name, sae in saes.items()}
    trained = {name: EvaluatedSAE(sae, True, data.batch_size) for name, sae in saes.items() if sae.batch_rule}
    subjects = [*deployed.values(), *trained.values()]
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


def reconstruct_all(
    subjects: list[EvaluatedSAE], data: ActivationData, batches: tuple[Tensor, ...]
) -> Bool[Tensor, " n"]:
    """Run the first pass: reconstruction metrics and L0. Returns a mask of the BOS tokens among the n tokens.

    Raises:
        UserError: the activations are not finite, or every position is left out.
    """
    if not any(data.keep_mask(tokens).any() for tokens in batches):
        raise UserError("data.exclude_* leaves out every held-out token: raise data.n_eval_tokens.")
    bos = []
    for tokens in track(batches, "evaluating reconstruction"):
        keep, x = data.kept(tokens)
        for subject in subjects:
            for batch, x_hat, code in subject.autoencode(x):
                subject.reconstruction.update(batch, x_hat, code, subject.sae.predicted_mask(batch))
                subject.l0.append(l0_per_row(code).cpu())
        bos.append(tokens[keep] == data.lm.bos_id)
    return torch.cat(bos)


def splice_all(subjects: list[EvaluatedSAE], data: ActivationData, batches: tuple[Tensor, ...]) -> None:
    """Run the second pass: cross-entropies with activations clean, set to zero or the mean, and replaced by x_hat."""
    mean = constant_ablation(subjects[0].reconstruction.mean_activation())
    for tokens in track(batches, "evaluating cross-entropy"):
        splice_batch(subjects, data, tokens, mean)


def splice_batch(subjects: list[EvaluatedSAE], data: ActivationData, tokens: Int[Tensor, "n t"], mean: Replace) -> None:
    """Process one batch of `splice_all`. SAEs that predict the same sources share the ablations."""
    lm, targets = data.lm, tokens.to(data.lm.device)
    activations = lm.activations(tokens)
    keep = data.keep_positions(tokens, activations)
    rows = activations[keep.to(activations.device)]

    def log_probs(replace: Replace, predicted: Bool[Tensor, "#b s"] | None) -> Tensor:
        return next_token_log_probs(spliced_logits(lm, tokens, activations, keep, replace, predicted))

    def ablate(n_inputs: int) -> dict[str, Tensor]:
        predicted = (torch.arange(rows.shape[1]) >= n_inputs).unsqueeze(0)
        by = {"ce_zero": zero_ablation, "ce_mean": mean}
        return {name: cross_entropy(log_probs(replace, predicted), targets) for name, replace in by.items()}

    clean = next_token_log_probs(lm.logits(tokens))
    p, ce_clean = clean.exp(), cross_entropy(clean, targets)
    ablations = {n: ablate(n) for n in {subject.sae.n_inputs for subject in subjects}}
    for subject in subjects:
        spliced = log_probs(subject.reconstruct, subject.sae.predicted_mask(rows))
        own = {"ce_spliced": cross_entropy(spliced, targets), "kl": kl_divergence(p, clean, spliced)}
        subject.downstream.to(lm.device).update(ce_clean=ce_clean, **ablations[subject.sae.n_inputs], **own)


def build_tables(subject: EvaluatedSAE, bos: Bool[Tensor, " n"]) -> dict[str, pd.DataFrame]:
    """Build two tables: the number of tokens by L0 (BOS apart), and the density of each latent."""
    density = subject.reconstruction.density().cpu().numpy()
    return {
        "l0_per_token": pd.DataFrame(l0_histogram(torch.cat(subject.l0), bos)),
        "latent_density": pd.DataFrame({"latent": range(len(density)), "density": density}),
    }
