"""Many SAEs, one stream: runs that want the same batches train side by side, each as if it were alone.

Every member is an ordinary run: a LightningModule, a Trainer, loggers and checkpoints of its own. Its Trainer lives in
a greenlet, which is paused whenever it asks for a batch. Once all have asked, the stream is drawn from once, and the
members take their step one after the other, in one thread. So a member computes what the same run computes alone, and
leaves the same files, from which it can be continued alone or in another group. One that has come further before joins
when the stream is where it stopped.
"""

import json
import logging
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from sae_lab.activations.data import ActivationData
from sae_lab.runs.folder import FAILED
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.signals import Signals
from sae_lab.sweeps.failures import failure_recorded, record_failure
from sae_lab.sweeps.lockstep import train_in_lockstep
from sae_lab.sweeps.member_logs import log_files, logging_for
from sae_lab.sweeps.search import search_score
from sae_lab.training.callbacks import SaveWhenDue
from sae_lab.training.progress import Throughput, TrainingProgress
from sae_lab.training.run import (
    Member,
    build_data,
    build_member,
    build_sae,
    finish,
    hydra_files,
    open_run,
    show_complete,
)

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A run as it was asked for: its config without interpolations, and the files of its `.hydra/`."""

    cfg: DictConfig
    hydra: dict[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir)

    def score(self) -> float | None:
        """What a search makes of it once it is done; None where it has failed."""
        metrics = self.folder / "metrics.json"
        return search_score(json.loads(metrics.read_text()), self.cfg.goal_l0) if metrics.is_file() else None


def read_job(cfg: DictConfig) -> Job:
    """The job of a config, while Hydra knows which job it is."""
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(resolved, DictConfig)
    return Job(resolved, hydra_files(cfg))


def train_jobs(jobs: list[Job], max_members: int | None = None) -> None:
    """Every job to its metrics or its `failed.txt`, in groups that share a stream.

    Args:
        jobs: runs, of whatever configs and in whatever state.
        max_members: SAEs in a group; None takes as many as the memory holds.
    """
    with log_files([job.folder for job in jobs]):
        for group in group_by_stream(jobs):
            while group:
                group = train_group(group, max_members)


def group_by_stream(jobs: list[Job]) -> list[list[Job]]:
    """The jobs that are not complete: those together that want the same batches, and first those that want most.

    What a batch holds is decided by `lm` and `data` alone.
    """
    groups: dict[str, list[tuple[int, Job]]] = {}
    for job in jobs:
        with logging_for(job.folder), failure_recorded(job.folder):
            run = open_run(job.cfg)
            if job.cfg.trainer.devices > 1:
                raise UserError("hydra/launcher=shared_stream trains in one process: leave it out, or trainer=ddp.")
            if run.complete:
                show_complete(run)
                continue
            stream = OmegaConf.masked_copy(job.cfg, ["lm", "data", "calibration_batches"])
            groups.setdefault(OmegaConf.to_yaml(stream, sort_keys=True), []).append((run.step, job))
    return [[job for _, job in sorted(group, key=itemgetter(0))] for group in groups.values()]


def train_group(jobs: list[Job], max_members: int | None) -> list[Job]:
    """Train and evaluate as many of these jobs, from the first on, as there is room for; the others are returned."""
    try:
        data = build_data(jobs[0].cfg)
    except Exception as e:
        for job in jobs:
            record_failure(job.folder, e)
        return []
    waiting, members, signals, free = list(jobs), list[Member](), Signals(), free_memory(data.lm.device)
    with ExitStack() as folders:
        while waiting and has_room(members, free, max_members):
            job = waiting.pop(0)
            with logging_for(job.folder), failure_recorded(job.folder):
                member = open_member(job, data, signals, first=not members)
                if member.run.complete:
                    log.info("%s was completed by another process", job.folder)
                    continue
                folders.enter_context(member.run.begin(job.hydra))
                members.append(member)
        log.info("%d SAEs share one pass over %s", len(members), data.lm.name)
        try:
            train_in_lockstep(members, data, signals)
        except Exception as e:  # of the stream: what is wrong with one member is its own failure
            for member in drop_failed(members):
                record_failure(member.run.folder, e)
        finish_together(members, data)
    return waiting


def open_member(job: Job, data: ActivationData, signals: Signals, first: bool) -> Member:
    """A run that draws from a shared stream; the first of them shows its progress."""
    run = open_run(job.cfg)
    callbacks = [SaveWhenDue(run.last_checkpoint, signals), TrainingProgress() if first else Throughput()]
    return build_member(job.cfg, run, build_sae(job.cfg, data), data, callbacks)


def free_memory(device: torch.device) -> int:
    """Bytes, on the device that trains."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def has_room(members: list[Member], free: int, max_members: int | None) -> bool:
    """Whether one more SAE, of the size of the largest, may train beside these.

    Counted are 16 bytes a parameter (itself, its gradient, Adam's two means), which may take half of the free memory:
    the other half is for activations and for what a step needs.
    """
    if max_members is not None:
        return len(members) < max_members
    sizes = [sum(p.numel() for p in member.sae.parameters()) for member in members]
    return not sizes or 16 * (sum(sizes) + max(sizes)) < free / 2


def finish_together(members: list[Member], data: ActivationData) -> None:
    """Calibrate, save and evaluate those that did not fail, in one pass; a failure here is that of all."""
    alive = drop_failed(members)
    if not alive:
        return
    try:
        finish(alive, data)
    except Exception as e:
        for member in alive:
            record_failure(member.run.folder, e)


def drop_failed(members: list[Member]) -> list[Member]:
    return [member for member in members if not (member.run.folder / FAILED).exists()]
