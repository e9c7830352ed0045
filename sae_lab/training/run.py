"""A run from its config to its metrics: build, fit, calibrate, save, evaluate."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.utils import configure_log
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lab.activations.building import build_data
from sae_lab.activations.columns import Columns
from sae_lab.activations.data import ActivationData
from sae_lab.activations.stream import StreamData
from sae_lab.evaluation.building import build_metrics
from sae_lab.evaluation.calibration import calibrate
from sae_lab.evaluation.evaluator import Evaluation, evaluate_all
from sae_lab.evaluation.findings import check_metrics, find_problems, find_too_few_steps
from sae_lab.evaluation.metrics import RowMetric
from sae_lab.interop.load import find_sae, load_sae
from sae_lab.parallel.agreement import deferred_on_all_ranks
from sae_lab.parallel.environment import Place, place
from sae_lab.parallel.group import on_rank_0, process_group
from sae_lab.parallel.launch import run_ranks
from sae_lab.parallel.mesh import first_share, latent_axis, rank, sharded_latents
from sae_lab.runs.checkpoint import check_fits
from sae_lab.runs.config import read_environment_keys
from sae_lab.runs.digests import SAE, recorded_when_written
from sae_lab.runs.folder import Run, examine_folder
from sae_lab.runs.provenance import provenance
from sae_lab.runs.results import read_metrics, write_results
from sae_lab.runtime.build import build, check_settings
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import SafeStop, UserError, first_line, report_typed_keys, settings_under
from sae_lab.runtime.memory import check_memory_of
from sae_lab.runtime.private import public
from sae_lab.runtime.screen import print_files, print_metrics
from sae_lab.runtime.signals import deferred_signals
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.dictionary import TOO_MANY_LATENTS
from sae_lab.saes.files import save_sae
from sae_lab.training.job import Job, hydra_files, job_logging, read_job
from sae_lab.training.loggers import finish_loggers
from sae_lab.training.module import SAEModule
from sae_lab.training.options import check_options
from sae_lab.training.progress import TrainingProgress
from sae_lab.training.rate import resolve_rate
from sae_lab.training.splice_loss import SpliceLoss
from sae_lab.training.trainer import check_devices

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
    """Train and evaluate one run, resuming from its folder if possible. Returns the metrics.

    `trainer.devices` processes train it: those that torchrun or srun started together with this one, or those that are
    started here. The metrics of the former are {} but in rank 0.
    """
    if (started := place()) is not None:
        join_started(cfg, started)
    check_options(cfg)
    job = read_job(cfg)
    if started is not None or cfg.trainer.devices == 1:
        return train_as_rank(job)
    with settings_under("trainer"):
        check_devices(resolve_device(cfg.trainer.accelerator, "accelerator"), cfg.trainer.devices)
    return run_ranks(cfg.trainer.devices, job.folder, train_as_rank, job, job_logging())


def join_started(cfg: DictConfig, started: Place) -> None:
    """Let a run use the processes that were started together. Those above rank 0 log nothing but warnings."""
    if cfg.trainer.devices != started.size and started.rank == 0:
        log.info("trainer.devices=%d, the number of processes that were started", started.size)
    cfg.trainer.devices = started.size
    if started.rank:
        logging.getLogger().handlers = [logging.StreamHandler()]
        logging.getLogger().setLevel(logging.WARNING)


def train_as_rank(job: Job, logging_config: Any = None) -> dict[str, Any]:
    """Train a run as one of its processes, then evaluate it in rank 0. Returns the metrics there, elsewhere {}.

    If the latents are sharded, all ranks evaluate it, since each of them holds a part.

    Args:
        logging_config: how rank 0 logs, if this process was started for the run.
    """
    with report_typed_keys(job.typed), ExitStack() as folder:
        # The typed keys within the group as well, which tells the other processes of an error.
        with process_group(), report_typed_keys(job.typed), sharded_latents(job.cfg.trainer.get("shard_latents", 1)):
            first = rank() == 0
            if first and logging_config is not None:
                configure_log(OmegaConf.create(logging_config))
            run = on_rank_0(lambda: open_run(job.cfg))
            if not run.complete:
                check_start(job.cfg, run)
                data = in_batches_of_loss(job.cfg, build_data(job.cfg))
                member = fit_as_rank(job, run, data, folder)
                if latent_axis().size > 1:  # no rank could go on alone
                    return finish([member], data)[0]
        if not first:
            return {}
        return show_complete(run) if run.complete else finish([member], data)[0]


def fit_as_rank(job: Job, run: Run, data: StreamData, folder: ExitStack) -> Member:
    """Build and train a run as one of its processes. Rank 0 begins its folder, which `folder` ends."""
    progress: list[Callback] = [TrainingProgress()] if rank() == 0 else []
    member = build_member(job.cfg, run, initial_sae(job.cfg, run, data), data, progress)
    # After everything is built, so that an invalid config leaves no folder.
    on_rank_0(lambda: folder.enter_context(run.begin(job.hydra)))
    with deferred_on_all_ranks():
        fit(member)
    return member


def train_member(member: Member, data: StreamData) -> dict[str, Any]:
    """Train a run that is built, then calibrate, save and evaluate its SAE on `data`. Returns the metrics."""
    with member.run.begin(hydra_files(member.cfg)):
        with deferred_signals():
            fit(member)
        [metrics] = finish([member], data)
    return metrics


def open_run(cfg: DictConfig) -> Run:
    """Validate the options and return the state of the run's folder."""
    check_options(cfg)
    try:
        return examine_folder(Path(cfg.run_dir), OmegaConf.to_container(cfg, resolve=True), cfg.resume)
    except UserError:  # such as another config, which a wrong value may be all of
        for part in ("sae", "lm", "data", "optimizer", "schedule"):
            check_settings(cfg, part)
        raise


def check_start(cfg: DictConfig, run: Run) -> None:
    """Raise a UserError if the SAE that training starts from is not there. It is read after the language model."""
    if cfg.init_from is not None and not run.step:
        find_sae(cfg.init_from)


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
    if isinstance(data, ActivationData) and data.has_whole_rows:
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
    check_memory_of(torch.device("cpu"), 4 * n_latents * data.d_in // latent_axis().size, TOO_MANY_LATENTS)
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

    If the latents are sharded, all ranks call this. Those with the first share of the rows save the SAE, all evaluate
    it on the same rows, and rank 0 writes the results.

    Args:
        data: the data of the stream. Its sites include those of every member.
        scope: context around what belongs to the member of one folder: its log, and what its failure means. A member
            whose failure the context does not raise is left out from there on.
    """
    saes = [member.sae.to(data.device) for member in members]  # Lightning moved them to the CPU after training
    calibrate(saes, data, members[0].cfg.calibration_batches, [member.data.sites for member in members])
    saved, metrics = list[Member](), list[dict[str, Any]]()
    with first_share() as saves:
        probe_rows = data.probe_rows()
        for member, sae in zip(members, saes, strict=True):
            with scope(member.run.folder):
                if saves:
                    save_member(member, sae, Columns(data.sites, member.data.sites)(probe_rows))
                saved.append(member)
        subjects = {str(member.run.folder): member.sae for member in saved}
        views, added = [member.data for member in saved], [member.metrics for member in saved]
        evaluations = evaluate_all(subjects, data, views, added) if saved else {}
    for member, evaluation in zip(saved, evaluations.values(), strict=True):
        with scope(member.run.folder):
            metrics.append(on_rank_0(partial(report, member, evaluation)))
    return metrics


def save_member(member: Member, sae: BaseSAE, probe_rows: Float[Tensor, "n s d"]) -> None:
    """Save the SAE of a run in its folder, with all ranks that hold a part of it."""
    said = provenance_of(member.cfg, member.run, member.data)
    with recorded_when_written(member.run.folder, SAE) if rank() == 0 else nullcontext():
        save_sae(sae, member.run.folder / "sae", said, probe_rows)


def report(member: Member, evaluation: Evaluation) -> dict[str, Any]:
    """Write and print the results of a run. Returns the metrics."""
    files = write_results(evaluation, member.sae, member.run.folder)
    if too_few := find_too_few_steps(evaluation.metrics, member.data.n_steps):
        log.warning("%s: %s.", member.run.folder, too_few)
    finish_loggers(member.trainer.loggers, evaluation.metrics, evaluation.tables)
    print_metrics(evaluation.metrics, member.run.folder)
    print_files([member.run.folder / "sae", *files])
    return evaluation.metrics


def provenance_of(cfg: DictConfig, run: Run, data: StreamData) -> dict[str, Any]:
    """Return what an SAE of the run says of its origin."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    return provenance(config, data.origin(), read_environment_keys(run.folder))


def show_complete(run: Run) -> dict[str, Any]:
    """Print the metrics of a complete run, and how to train it again; raise a UserError if one is not finite."""
    metrics = read_metrics(run.folder)
    check_metrics(metrics)  # earlier versions wrote NaN
    print_metrics(metrics, run.folder)
    for problem in find_problems(metrics):
        log.warning("%s: %s.", run.folder, problem)
    log.info("%s is complete: type resume=never to train it again.", run.folder)
    return metrics
