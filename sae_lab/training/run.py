"""A run from its config to its metrics: build, fit, calibrate, save, evaluate."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper

from sae_lab.activations.building import build_data
from sae_lab.activations.columns import Columns
from sae_lab.activations.data import ActivationData
from sae_lab.activations.stream import StreamData
from sae_lab.evaluation.building import build_metrics
from sae_lab.evaluation.calibration import calibrate
from sae_lab.evaluation.evaluator import evaluate_all
from sae_lab.evaluation.findings import check_metrics, find_problems
from sae_lab.evaluation.metrics import RowMetric
from sae_lab.interop.load import load_sae
from sae_lab.parallel.launch import launch_ranks
from sae_lab.parallel.mesh import rank
from sae_lab.runs.checkpoint import check_fits
from sae_lab.runs.config import environment_file, read_config, read_environment_keys
from sae_lab.runs.digests import SAE, recorded_when_written
from sae_lab.runs.folder import Run, examine_folder
from sae_lab.runs.paths import with_absolute_paths
from sae_lab.runs.provenance import provenance
from sae_lab.runs.results import read_metrics, write_results
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import SafeStop, UserError, first_line
from sae_lab.runtime.memory import check_memory_of
from sae_lab.runtime.private import keys_from_environment, public
from sae_lab.runtime.screen import print_files, print_metrics
from sae_lab.runtime.signals import deferred_signals
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.dictionary import TOO_MANY_LATENTS
from sae_lab.saes.files import save_sae
from sae_lab.training.loggers import finish_loggers
from sae_lab.training.module import SAEModule
from sae_lab.training.options import check_options
from sae_lab.training.progress import TrainingProgress
from sae_lab.training.rate import resolve_rate
from sae_lab.training.splice_loss import SpliceLoss

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One run in training: its config, folder, SAE, module, Trainer and data."""

    cfg: DictConfig
    run: Run
    sae: BaseSAE
    module: SAEModule
    trainer: L.Trainer
    data: StreamData
    metrics: dict[str, RowMetric]
    """Metrics of one's own."""


def train_run(cfg: DictConfig) -> dict[str, Any]:
    """Train and evaluate one run, resuming from its folder if possible. Returns the metrics."""
    run = open_run(cfg)
    if run.complete:
        return show_complete(run)
    data = in_batches_of_loss(cfg, build_data(cfg))
    member = build_member(cfg, run, initial_sae(cfg, run, data), data, [TrainingProgress()])
    return train_member(member, data)


def train_member(member: Member, data: StreamData) -> dict[str, Any]:
    """Train a run that is built, then calibrate, save and evaluate its SAE on `data`. Returns the metrics."""
    cfg, run = member.cfg, member.run
    with run.begin(hydra_files(cfg)):  # after everything is built, so that an invalid config leaves no folder
        ranks = launch_ranks(run.folder, cfg.trainer.devices, f"{__name__}:{train_as_follower.__name__}")
        with ranks, deferred_signals():
            fit(member)
        [metrics] = finish([member], data)
    return metrics


def train_as_follower(folder: Path) -> None:
    """Train the run in `folder` as a rank above 0. Rank 0 has created the folder and writes all files."""
    cfg = read_config(folder)
    data = in_batches_of_loss(cfg, build_data(cfg))
    run = examine_folder(folder, OmegaConf.to_container(cfg), "auto")
    fit(build_member(cfg, run, initial_sae(cfg, run, data), data, []))


def open_run(cfg: DictConfig) -> Run:
    """Validate the options and return the state of the run's folder."""
    check_options(cfg)
    return examine_folder(Path(cfg.run_dir), OmegaConf.to_container(cfg, resolve=True), cfg.resume)


def in_batches_of_loss(cfg: DictConfig, data: StreamData) -> StreamData:
    """Return `data` in the batches that the config's loss needs: whole text rows, or single rows."""
    return data.in_whole_rows() if cfg.get("loss") else data


def build_member(cfg: DictConfig, run: Run, sae: BaseSAE, data: StreamData, callbacks: list[Callback]) -> Member:
    """Build the module and the Trainer of a run. `callbacks` run after those of the config."""
    if sae.reads_previous:
        data = data.with_previous()
    schedule = partial(build(cfg, "schedule"), n_steps=data.n_steps)
    rate = resolve_rate(cfg.optimizer, sae.d_in, sae.n_latents, data.n_steps)
    optimizer = build(cfg, "optimizer", **rate)
    metrics = build_metrics(cfg)
    module = SAEModule(sae, optimizer, schedule, cfg.max_grad_norm, splice_loss(data), metrics)
    module.provenance = lambda: provenance_of(cfg, run, data)
    module.configure_optimizers()  # raises on invalid arguments before the run begins
    observers = [build(cfg, f"callbacks.{name}") for name in cfg.callbacks or {}]
    trainer = build(cfg, "trainer")(run_dir=run.folder, n_steps=data.n_steps, callbacks=[*observers, *callbacks])
    return Member(cfg, run, sae, module, trainer, data, metrics)


def splice_loss(data: StreamData) -> SpliceLoss | None:
    """Return the language model's part of the loss, for data in whole text rows."""
    if isinstance(data, ActivationData) and data.whole_rows:
        return SpliceLoss(data.lm, data.lm_batch_rows)
    return None


@torch.no_grad()
def initialize_from(sae: BaseSAE, source: str) -> None:
    """Copy the weights of another SAE, of this or another library, into `sae`.

    Raises:
        UserError: the weights do not fit, or rows of W_dec do not have unit norm: the first training step would
            rescale them.
    """
    try:
        sae.start_from(load_sae(source))
        sae.restart()
    except UserError as e:
        raise UserError(f"init_from={source}: {e}") from e
    loaded = [parameter.clone() for parameter in sae.parameters()]
    sae.after_step()
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(loaded, sae.parameters(), strict=True)):
        raise UserError(
            f"{source} has rows of W_dec that are not of unit norm, but training keeps them at unit norm: give "
            "sae.frozen_decoder=true, or save the result of load_sae(..., fold_decoder_norm=True) and start from that."
        )


def build_sae(cfg: DictConfig, data: StreamData) -> BaseSAE:
    """Build the SAE of the config, with n_latents latents or, if that is None, expansion * d_in."""
    n_latents = int(cfg.n_latents or cfg.expansion * data.d_in)
    if n_latents < 1:
        raise UserError(f"expansion={cfg.expansion} of width {data.d_in} leaves no latent: raise expansion.")
    check_memory_of(torch.device("cpu"), 4 * n_latents * data.d_in, TOO_MANY_LATENTS)
    sae = build(cfg, "sae", d_in=data.d_in, n_latents=n_latents, n_sources=data.n_sources)
    if has_frozen_dictionary(sae) and cfg.init_from is None:
        raise UserError("frozen_decoder=true would freeze a random dictionary: give init_from=<folder of an SAE>.")
    return sae


def initial_sae(cfg: DictConfig, run: Run, data: StreamData) -> BaseSAE:
    """Build the SAE of the config with the weights that training starts from."""
    sae = build_sae(cfg, data)
    if cfg.init_from is not None and not run.step:
        initialize_from(sae, cfg.init_from)
    return sae


def has_frozen_dictionary(sae: BaseSAE) -> bool:
    """Return whether W_dec of the SAE, or of the SAE inside it, is frozen."""
    return any(name.endswith("W_dec") and not W.requires_grad for name, W in sae.named_parameters())


def fit(member: Member) -> None:
    """Train to the end of the stream, from the folder's checkpoint if there is one; save a checkpoint at the end.

    Raises:
        SafeStop: a signal arrived, and a checkpoint of the last step is saved.
    """
    run, trainer, data = member.run, member.trainer, member.data
    steps, rate = f"{data.n_steps} steps of {data.batch_size} tokens", member.module.peak_rate
    log.info("training %s at learning rate %.2g in %s", steps, rate, run.folder)
    if run.step:
        check_fits(run.last_checkpoint, member.module, type(data).__name__)
        log.info("continuing from step %d of %s", run.step, run.checkpoint)
    if rank() == 0:
        trainer.loggers = [start_logger(member, name) for name in member.cfg.logger]
    try:
        trainer.fit(member.module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    except SafeStop as e:
        raise save_at_stop(member, e) from None
    if trainer.global_step < data.n_steps:
        reason = "a callback stopped the run" if trainer.should_stop else "the text ended (data.repeat=false)"
        log.warning("%s at step %d of %d", reason, trainer.global_step, data.n_steps)
    if rank() == 0:
        trainer.save_checkpoint(run.last_checkpoint)


def start_logger(member: Member, name: str) -> Logger:
    """Build a logger of the config, and log the config.

    Raises:
        UserError: the logger is of another library, and fails at a setting when it opens its file.
    """
    logger: Logger = build(member.cfg, f"logger.{name}")
    config = OmegaConf.to_container(member.cfg, resolve=True)
    try:
        logger.log_hyperparams(public(config, read_environment_keys(member.run.folder)))
    except (TypeError, ValueError) as e:
        raise UserError(f"logger.{name} does not start: {first_line(e.__cause__ or e)}") from e
    return logger


def save_at_stop(member: Member, stop: SafeStop) -> SafeStop:
    """Save a checkpoint if a step was taken since the last start. Returns the exception that says so."""
    run, step = member.run, member.trainer.global_step
    if step > run.step:
        member.trainer.save_checkpoint(run.last_checkpoint)
    saved = f", saved as {run.last_checkpoint}" if step else ""
    return SafeStop(f"{stop} at step {step} of {member.data.n_steps}{saved}", stop.signum)


def finish(
    members: Sequence[Member],
    data: StreamData,
    scope: Callable[[Path], AbstractContextManager] = lambda folder: nullcontext(),
) -> list[dict[str, Any]]:
    """Calibrate, save and evaluate members that share a stream. Returns the metrics of those that succeed.

    Args:
        data: the data of the stream. Its sites include those of every member.
        scope: context around what belongs to the member of one folder: its log, and what its failure means. A member
            whose failure the context does not raise is left out from there on.
    """
    saes = [member.sae.to(data.device) for member in members]  # Lightning moved them to the CPU after training
    calibrate(saes, data, members[0].cfg.calibration_batches, [member.data.sites for member in members])
    probe_rows = data.probe_rows()
    saved, metrics = list[Member](), list[dict[str, Any]]()
    for member, sae in zip(members, saes, strict=True):
        with scope(member.run.folder):
            said = provenance_of(member.cfg, member.run, member.data)
            with recorded_when_written(member.run.folder, SAE):
                own_columns = Columns(data.sites, member.data.sites)
                save_sae(sae, member.run.folder / "sae", said, own_columns(probe_rows))
            saved.append(member)
    subjects = {str(member.run.folder): member.sae for member in saved}
    views, added = [member.data for member in saved], [member.metrics for member in saved]
    evaluations = evaluate_all(subjects, data, views, added) if saved else {}
    for member, evaluation in zip(saved, evaluations.values(), strict=True):
        with scope(member.run.folder):
            files = write_results(evaluation, member.sae, member.run.folder)
            finish_loggers(member.trainer.loggers, evaluation.metrics, evaluation.tables)
            print_metrics(evaluation.metrics, member.run.folder)
            print_files([member.run.folder / "sae", *files])
            metrics.append(evaluation.metrics)
    return metrics


def provenance_of(cfg: DictConfig, run: Run, data: StreamData) -> dict[str, Any]:
    """Return what an SAE of the run says of its origin."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    return provenance(config, data.origin(), read_environment_keys(run.folder))


def hydra_files(cfg: DictConfig) -> dict[str, str]:
    """Return the files of `.hydra/` as Hydra writes them, but with interpolations and relative paths resolved.

    Where the environment has a part in a value, its key is kept, so that the value is not shown to others.
    """
    config = with_absolute_paths(OmegaConf.to_container(cfg, resolve=True))
    files = {"config.yaml": OmegaConf.to_yaml(OmegaConf.create(config))}
    if keys := keys_from_environment(cfg):
        files[environment_file(Path()).name] = "".join(f"{key}\n" for key in keys)
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        tree = {"hydra": OmegaConf.to_container(hydra, enum_to_str=True)}
        files["hydra.yaml"] = yaml.dump(tree, Dumper=get_omega_conf_dumper(), sort_keys=False, allow_unicode=True)
        files["overrides.yaml"] = OmegaConf.to_yaml(hydra.overrides.task)
    return files


def show_complete(run: Run) -> dict[str, Any]:
    """Print the metrics of a complete run, and how to train it again; raise a UserError if one is not finite."""
    metrics = read_metrics(run.folder)
    check_metrics(metrics)  # earlier versions wrote NaN
    print_metrics(metrics, run.folder)
    for problem in find_problems(metrics):
        log.warning("%s: %s.", run.folder, problem)
    log.info("%s is complete: type resume=never to train it again.", run.folder)
    return metrics
