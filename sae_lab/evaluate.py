"""A run -> its metrics, tables and figures: `python -m sae_lab.evaluate run_dir=outputs/...`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from hydra.utils import get_class, instantiate
from jaxtyping import Bool, Int
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lab import plots
from sae_lab.activations.data import ActivationData
from sae_lab.activations.digests import refuse_changed
from sae_lab.cli.entry import entry_point, folder_of
from sae_lab.evaluation import diffing
from sae_lab.evaluation.downstream import Replace, constant, spliced_logits, zero
from sae_lab.evaluation.metrics import (
    DownstreamMetrics,
    ReconstructionMetrics,
    cross_entropy,
    kl_divergence,
    l0_histogram,
    next_token_log_probs,
)
from sae_lab.evaluation.rules import with_activation
from sae_lab.ops.pursuit import METHODS
from sae_lab.ops.sparse import Code, l0_per_row
from sae_lab.runs.checkpoint import checkpoint_content
from sae_lab.runtime.checks import checked_number
from sae_lab.runtime.device import now
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.screen import print_files, print_metrics, track
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae, sae_folder
from sae_lab.saes.pursuit_sae import PursuitSAE


class Evaluation(NamedTuple):
    """Metrics by name, and the tables that the figures are drawn from."""

    metrics: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    rows_per_second: float
    """How fast the SAE gave x_hat and codes: encoder and decoder, in turns with the other SAEs of this evaluation."""


class Subject:
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
                yield batch, *self.timed(batch)
        finally:
            self.sae.train(before)

    def timed(self, x: Tensor) -> tuple[Tensor, Code]:
        start = now(self.device)
        result = self.sae.autoencode(x)
        self.seconds += now(self.device) - start
        self.n_rows += len(x)
        return result

    def reconstruct(self, x: Tensor) -> Tensor:
        return torch.cat([x_hat for _, x_hat, _ in self.autoencode(x)])

    def metrics(self) -> dict[str, float]:
        return self.reconstruction.compute() | self.downstream.compute()


def calibrate(saes: Sequence[BaseSAE], data: ActivationData, n_batches: int) -> None:
    """Let every SAE estimate what its inference needs (BatchTopK's threshold), on the first training batches."""
    for i, x in enumerate(data.calibration_batches(n_batches)):
        for sae in saes:
            sae.calibrate(x.to(next(sae.parameters()).device), i)


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
    deployed = {name: Subject(sae, False, data.batch_size) for name, sae in saes.items()}
    trained = {name: Subject(sae, True, data.batch_size) for name, sae in saes.items() if sae.batch_rule}
    subjects = [*deployed.values(), *trained.values()]
    bos = reconstruct_all(subjects, data, batches)
    splice_all(subjects, data, batches)
    evaluations = {}
    for name, subject in deployed.items():
        metrics = subject.metrics()
        train_mode = trained[name].metrics() if name in trained else dict(metrics)
        drawn = tables(subject, bos)
        if data.lm.models and not subject.sae.n_inputs:
            drawn["relative_norm"] = diffing.latents(subject.sae.directions(), subject.reconstruction.density())
            metrics |= diffing.class_counts(drawn["relative_norm"])
        evaluations[name] = Evaluation(metrics | {"train_mode": train_mode}, drawn, subject.n_rows / subject.seconds)
    return evaluations


def reconstruct_all(subjects: list[Subject], data: ActivationData, batches: tuple[Tensor, ...]) -> Bool[Tensor, " n"]:
    """First walk: reconstruction metrics and L0s. Returns which of the n tokens are BOS."""
    bos = []
    for tokens in track(batches, "evaluating reconstruction"):
        keep = data.keep(tokens)
        x = data.lm.activations(tokens)
        x = x[keep.to(x.device)]
        for subject in subjects:
            for batch, x_hat, code in subject.autoencode(x):
                subject.reconstruction.update(batch, x_hat, code, subject.sae.covers(batch))
                subject.l0.append(l0_per_row(code).cpu())
        bos.append(tokens[keep] == data.lm.bos_id)
    return torch.cat(bos)


def splice_all(subjects: list[Subject], data: ActivationData, batches: tuple[Tensor, ...]) -> None:
    """Second walk: cross-entropies with the activations clean, zeroed, set to their mean and, per subject, spliced."""
    mean = constant(subjects[0].reconstruction.mean_activation())
    for tokens in track(batches, "evaluating cross-entropy"):
        splice(subjects, data, tokens, mean)


def splice(subjects: list[Subject], data: ActivationData, tokens: Int[Tensor, "n t"], mean: Replace) -> None:
    """One batch of `splice_all`; subjects that predict the same sources share the ablations."""
    lm, keep, targets = data.lm, data.keep(tokens), tokens.to(data.lm.device)
    activations = lm.activations(tokens)
    rows = activations[keep.to(activations.device)]

    def log_probs(replace: Replace, covers: Bool[Tensor, "#b s"] | None) -> Tensor:
        return next_token_log_probs(spliced_logits(lm, tokens, activations, keep, replace, covers))

    def ablated(n_inputs: int) -> dict[str, Tensor]:
        covers = (torch.arange(rows.shape[1]) >= n_inputs).unsqueeze(0)
        by = {"ce_zero": zero, "ce_mean": mean}
        return {name: cross_entropy(log_probs(replace, covers), targets) for name, replace in by.items()}

    clean = next_token_log_probs(lm.logits(tokens))
    p, ce_clean = clean.exp(), cross_entropy(clean, targets)
    ablations = {n: ablated(n) for n in {subject.sae.n_inputs for subject in subjects}}
    for subject in subjects:
        spliced = log_probs(subject.reconstruct, subject.sae.covers(rows))
        own = {"ce_spliced": cross_entropy(spliced, targets), "kl": kl_divergence(p, clean, spliced)}
        subject.downstream.to(lm.device).update(ce_clean=ce_clean, **ablations[subject.sae.n_inputs], **own)


def tables(subject: Subject, bos: Bool[Tensor, " n"]) -> dict[str, pd.DataFrame]:
    """Tokens by L0 (BOS apart), and the share of tokens on which each latent fires."""
    density = subject.reconstruction.density().cpu().numpy()
    return {
        "l0_per_token": pd.DataFrame(l0_histogram(torch.cat(subject.l0), bos)),
        "latent_density": pd.DataFrame({"latent": range(len(density)), "density": density}),
    }


def write_results(evaluation: Evaluation, sae: BaseSAE, run_dir: Path) -> list[Path]:
    """metrics.json last, since it marks a run as complete; before it the tables and figures of `figures/`."""
    figures = run_dir / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, table in evaluation.tables.items():
        table.to_csv(figures / f"{name}.csv", index=False)
    written = [
        plots.l0_per_token(evaluation.tables["l0_per_token"], figures / "l0_per_token.png", k=sae.config.get("k")),
        plots.latent_density(evaluation.tables["latent_density"], figures / "latent_density.png"),
    ]
    if "relative_norm" in evaluation.tables:
        written.append(plots.relative_norm(evaluation.tables["relative_norm"], figures / "relative_norm.png"))
    log_file = run_dir / "metrics.csv"
    if log_file.is_file():
        written.append(plots.training_curves(pd.read_csv(log_file), figures / "training.png"))
    return [write_metrics(evaluation.metrics, sae, run_dir / "metrics.json"), *written]


def write_metrics(metrics: dict[str, Any], sae: BaseSAE, path: Path) -> Path:
    sizes = {"n_latents": sae.n_latents, "d_in": sae.d_in, "n_sources": sae.n_sources}
    write_json(path, metrics | sizes)
    return path


def evaluate_under(activation: str, sae: BaseSAE, data: ActivationData, calibration_batches: int) -> dict[str, Any]:
    """The metrics of the parameters of `sae` under the rule that `activation` names."""
    other = with_activation(sae, activation)
    if other.batch_rule:
        calibrate([other], data, calibration_batches)
    metrics = evaluate(other, data).metrics
    batch_wise = metrics.pop("train_mode")
    return (batch_wise if activation == "batch_topk" else metrics) | {"activation": activation}


def compare(sae: BaseSAE, encoder: str, k: int | None, data: ActivationData, folder: Path) -> Path:
    """The SAE's own encoder and a pursuit of its dictionary, side by side in a file of their own, with rows/s."""
    if encoder not in METHODS:
        raise UserError(f"encoder={encoder} is not known: choose own or one of {', '.join(METHODS)}.")
    pursuit = PursuitSAE.of(sae, encoder, k)
    evaluations = evaluate_all({"own": sae, encoder: pursuit}, data)
    metrics = {name: {"rows_per_second": e.rows_per_second} | e.metrics for name, e in evaluations.items()}
    metrics[encoder]["k"] = pursuit.k
    print_metrics(metrics["own"] | {"train_mode": metrics[encoder]}, folder, ("own", encoder))
    file = folder / f"metrics_{encoder}{'' if k is None else f'_k{k}'}.json"
    write_json(file, metrics)
    return file


def load_run(
    run_dir: str | Path, device: str = "auto", n_eval_tokens: int | None = None, sae_dir: str | Path | None = None
) -> tuple[BaseSAE, ActivationData, DictConfig]:
    """The SAE that a run left, on the language model's device; its data, built again, with that model; its config.

    With `sae_dir`, the SAE in that folder in place of its own.

    Raises:
        UserError: no run folder, or no SAE in it or in `sae_dir`; a number of tokens that is none; another model or
            text than the run had.
    """
    config_file = Path(run_dir) / ".hydra" / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run folder (no .hydra/config.yaml): give run_dir=<folder of a run>.")
    run = OmegaConf.load(config_file)
    assert isinstance(run, DictConfig)
    if n_eval_tokens is not None:
        run.data.n_eval_tokens = checked_number("n_eval_tokens", n_eval_tokens, 1, whole=True)
    run.lm.device = device
    get_class(run.sae._target_)  # registers an SAE that lies outside this package
    data = instantiate(run.data, lm=instantiate(run.lm))
    checkpoint = Path(run_dir) / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():
        began_with = checkpoint_content(checkpoint).get(type(data).__name__, {}).get("origin", {})
        refuse_changed(began_with, data.origin, "put back what it was trained with.")
    return load_sae(sae_dir or run_dir, data.lm.device), data, run


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Repeat the evaluation of a run on its own data; `n_eval_tokens` and `device` may differ.

    With another `activation` or `encoder` than the SAE's own, the run's files stay as they are: metrics_<which>.json is
    added. With `sae_dir` they do in any case: what is written lies in that SAE's folder.
    """
    run_dir = folder_of(cfg, "run_dir")
    folder = run_dir if cfg.sae_dir is None else sae_folder(folder_of(cfg, "sae_dir"))
    if cfg.activation is not None and cfg.encoder != "own":
        raise UserError(f"activation={cfg.activation} and encoder={cfg.encoder} replace the same thing: give one.")
    keep_freed_memory()
    sae, data, run = load_run(run_dir, cfg.device, cfg.n_eval_tokens, cfg.sae_dir)
    if cfg.activation is not None:
        metrics = evaluate_under(cfg.activation, sae, data, run.calibration_batches)
        print_metrics(metrics, folder)
        print_files([write_metrics(metrics, sae, folder / f"metrics_{cfg.activation}.json")])
        return
    if cfg.encoder != "own":
        print_files([compare(sae, cfg.encoder, cfg.pursuit.k, data, folder)])
        return
    evaluation = evaluate(sae, data)
    print_metrics(evaluation.metrics, folder)
    print_files(write_results(evaluation, sae, folder))


if __name__ == "__main__":
    main()
