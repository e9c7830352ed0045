"""SAEs of the same sites -> their metrics and tables, from two walks over held-out text that all of them share."""

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
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE


class Evaluation(NamedTuple):
    """Metrics by name, and the tables that the figures are drawn from."""

    metrics: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    rows_per_second: float
    """How fast the SAE gave x_hat and codes: encoder and decoder, in turns with the other SAEs of this evaluation."""


class EvaluatedSAE:
    """One SAE under one rule, and the totals gathered for it."""

    def __init__(self, sae: BaseSAE, training_rule: bool, batch_size: int):
        self.sae, self.training_rule, self.batch_size = sae, training_rule, batch_size
        self.device = next(sae.parameters()).device
        self.reconstruction = ReconstructionMetrics(sae.n_latents).to(self.device)
        self.downstream = DownstreamMetrics()
        self.l0: list[Tensor] = []
        self.n_rows, self.seconds = 0, 0.0

    def autoencode(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Code]]:
        """(x, x_hat, code) under this rule, in equal parts of about a training batch; the SAE's mode stays."""
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
        return torch.cat([x_hat for _, x_hat, _ in self.autoencode(x)])

    def metrics(self) -> dict[str, float]:
        return self.reconstruction.compute() | self.downstream.compute()


def evaluate(sae: BaseSAE, data: ActivationData) -> Evaluation:
    """The metrics of `metrics.py` on held-out text, under the deployed rule and, as `train_mode`, the training rule."""
    return evaluate_all({"": sae}, data)[""]


@torch.no_grad()
def evaluate_all(saes: Mapping[str, BaseSAE], data: ActivationData) -> dict[str, Evaluation]:
    """`evaluate` for several SAEs of the same sites, which share every pass over the language model.

    The training rule sees batches of about the training size: whole text rows, from all over the held-out text.
    No SAE's state or mode changes.
    """
    rows_at_once = max(data.lm_batch_rows, math.ceil(data.batch_size / data.seq_len))
    batches = data.held_out_rows(data.n_eval_tokens).split(rows_at_once)
    deployed = {name: EvaluatedSAE(sae, False, data.batch_size) for name, sae in saes.items()}
    trained = {name: EvaluatedSAE(sae, True, data.batch_size) for name, sae in saes.items() if sae.batch_rule}
    subjects = [*deployed.values(), *trained.values()]
    bos = reconstruct_all(subjects, data, batches)
    splice_all(subjects, data, batches)
    evaluations = {}
    for name, subject in deployed.items():
        metrics = subject.metrics()
        train_mode = trained[name].metrics() if name in trained else dict(metrics)
        drawn = build_tables(subject, bos)
        if data.lm.models and not subject.sae.n_inputs:
            drawn["relative_norm"] = diffing.latent_table(subject.sae.directions(), subject.reconstruction.density())
            metrics |= diffing.class_counts(drawn["relative_norm"])
        evaluations[name] = Evaluation(metrics | {"train_mode": train_mode}, drawn, subject.n_rows / subject.seconds)
    return evaluations


def reconstruct_all(
    subjects: list[EvaluatedSAE], data: ActivationData, batches: tuple[Tensor, ...]
) -> Bool[Tensor, " n"]:
    """First walk: reconstruction metrics and L0s. Returns which of the n tokens are BOS."""
    bos = []
    for tokens in track(batches, "evaluating reconstruction"):
        keep = data.keep(tokens)
        x = data.lm.activations(tokens)
        x = x[keep.to(x.device)]
        for subject in subjects:
            for batch, x_hat, code in subject.autoencode(x):
                subject.reconstruction.update(batch, x_hat, code, subject.sae.predicted_mask(batch))
                subject.l0.append(l0_per_row(code).cpu())
        bos.append(tokens[keep] == data.lm.bos_id)
    return torch.cat(bos)


def splice_all(subjects: list[EvaluatedSAE], data: ActivationData, batches: tuple[Tensor, ...]) -> None:
    """Second walk: cross-entropies with the activations clean, zeroed, set to their mean and, per subject, spliced."""
    mean = constant_ablation(subjects[0].reconstruction.mean_activation())
    for tokens in track(batches, "evaluating cross-entropy"):
        splice_batch(subjects, data, tokens, mean)


def splice_batch(subjects: list[EvaluatedSAE], data: ActivationData, tokens: Int[Tensor, "n t"], mean: Replace) -> None:
    """One batch of `splice_all`; subjects that predict the same sources share the ablations."""
    lm, keep, targets = data.lm, data.keep(tokens), tokens.to(data.lm.device)
    activations = lm.activations(tokens)
    rows = activations[keep.to(activations.device)]

    def log_probs(replace: Replace, covers: Bool[Tensor, "#b s"] | None) -> Tensor:
        return next_token_log_probs(spliced_logits(lm, tokens, activations, keep, replace, covers))

    def ablated(n_inputs: int) -> dict[str, Tensor]:
        covers = (torch.arange(rows.shape[1]) >= n_inputs).unsqueeze(0)
        by = {"ce_zero": zero_ablation, "ce_mean": mean}
        return {name: cross_entropy(log_probs(replace, covers), targets) for name, replace in by.items()}

    clean = next_token_log_probs(lm.logits(tokens))
    p, ce_clean = clean.exp(), cross_entropy(clean, targets)
    ablations = {n: ablated(n) for n in {subject.sae.n_inputs for subject in subjects}}
    for subject in subjects:
        spliced = log_probs(subject.reconstruct, subject.sae.predicted_mask(rows))
        own = {"ce_spliced": cross_entropy(spliced, targets), "kl": kl_divergence(p, clean, spliced)}
        subject.downstream.to(lm.device).update(ce_clean=ce_clean, **ablations[subject.sae.n_inputs], **own)


def build_tables(subject: EvaluatedSAE, bos: Bool[Tensor, " n"]) -> dict[str, pd.DataFrame]:
    """Tokens by L0 (BOS apart), and the share of tokens on which each latent fires."""
    density = subject.reconstruction.density().cpu().numpy()
    return {
        "l0_per_token": pd.DataFrame(l0_histogram(torch.cat(subject.l0), bos)),
        "latent_density": pd.DataFrame({"latent": range(len(density)), "density": density}),
    }
