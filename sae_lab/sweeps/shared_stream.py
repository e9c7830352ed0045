"""Train many SAEs on one stream: runs that read the same text share one pass over the language model.

Each member of a group is an ordinary run with its own LightningModule, Trainer, loggers and checkpoints. Its Trainer
runs in a greenlet that pauses when it asks for a batch. When all members have asked, one batch is drawn from the stream
and the members take their steps one after the other, in one thread. The stream has the sites of all members, and each
member sees its own. A member therefore computes the same bits and writes the same files as the run alone, and can be
resumed alone or in another group. A member that resumes from a later step joins when the stream reaches that step.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from sae_lab.activations.building import build_data
from sae_lab.activations.stream import StreamData
from sae_lab.runs.folder import FAILED
from sae_lab.runtime.errors import UserError, report_typed_keys
from sae_lab.runtime.plain_text import plural
from sae_lab.sweeps.failures import failure_recorded, record_failure
from sae_lab.sweeps.lockstep import train_in_lockstep
from sae_lab.sweeps.member_logs import log_files, logging_for
from sae_lab.sweeps.search import search_score
from sae_lab.training.job import Job, sites_of
from sae_lab.training.progress import Throughput, TrainingProgress
from sae_lab.training.run import (
    Member,
    build_member,
    finish,
    in_batches_of_loss,
    initial_sae,
    open_run,
    show_complete,
)
from sae_lab.training.trainer import training_device

log = logging.getLogger(__name__)


def score_of(job: Job) -> float | None:
    """Return the score that a search minimizes; None if the run failed."""
    metrics = job.folder / "metrics.json"
    return search_score(json.loads(metrics.read_text()), job.cfg.goal_l0) if metrics.is_file() else None


def train_jobs(jobs: list[Job], max_members: int | None = None) -> None:
    """Train all jobs, in groups that share a stream. Each job ends with metrics or with `failed.txt`.

    Args:
        jobs: runs with any config, in any state.
        max_members: SAEs in a group; None: as many as the memory holds.
    """
    with log_files([job.folder for job in jobs]):
        for group in group_by_stream(jobs):
            while group:
                group = train_group(group, max_members)


def group_by_stream(jobs: list[Job]) -> list[list[Job]]:
    """Group the incomplete jobs by the text and the model that they read; sort each group by the step to resume from.

    They are `lm`, but for its sites, `data` and `loss`. `calibration_batches` must be equal too, because members
    calibrate together.
    """
    groups: dict[str, list[tuple[int, Job]]] = {}
    for job in jobs:
        with logging_for(job.folder), failure_recorded(job.folder):
            if {job.cfg.trainer.devices, job.cfg.trainer.get("shard_latents", 1)} != {1}:
                raise UserError(
                    "hydra/launcher=shared_stream trains in one process: leave it out, or trainer=ddp, trainer.devices "
                    "and trainer.shard_latents."
                )
            run = open_run(job.cfg)
            if run.complete:
                show_complete(run)
                continue
            groups.setdefault(stream_key(job.cfg), []).append((run.step, job))
    return [[job for _, job in sorted(group, key=itemgetter(0))] for group in groups.values()]


def stream_key(cfg: DictConfig) -> str:
    """Return what decides the batches of a run, but for the sites: members of a group may read different ones."""
    stream: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, ["lm", "data", "calibration_batches", "loss"]))
    if sites_of(cfg) is not None:
        del stream["lm"]["sites"]
    return json.dumps(stream, sort_keys=True)


class Views:
    """The data of a group at the sites of each job. Jobs of the same sites share them.

    Args:
        first: the job whose config builds the language model and the data.
    """

    def __init__(self, first: Job):
        with report_typed_keys(first.typed):
            self.data = in_batches_of_loss(first.cfg, build_data(first.cfg))
        self.views: dict[tuple[str, ...] | None, StreamData | None] = {
            first.sites: self.data.with_sites(self.data.sites)
        }

    def at(self, job: Job) -> StreamData | None:
        """Return the data at the sites of a job; None if they cannot be read together with those of the first job.

        They have another width, say, the cache does not have them, or `data.max_norm` leaves out other rows. Such a job
        needs a group of its own, where its mistake is reported if there is one.
        """
        if job.sites not in self.views:
            assert job.sites is not None
            with suppress(UserError):
                view = self.data.with_sites(job.sites)
                if view.shares_rows_with(self.data):
                    self.views[job.sites] = view
        return self.views.setdefault(job.sites, None)

    def joined(self, views: Iterable[StreamData]) -> StreamData:
        """Return the data at all sites of some views."""
        return self.data.with_joined_sites(all_sites(views))

    def block_bytes(self, views: Iterable[StreamData], device: torch.device) -> int:
        """Return the memory of a device that a block of activations at all sites of some views takes."""
        if self.data.device != device:
            return 0
        return self.data.block_bytes // self.data.n_sources * len(all_sites(views))


def all_sites(views: Iterable[StreamData]) -> tuple[str, ...]:
    """Return the sites of some views, each once, in the order in which they come first."""
    return tuple(dict.fromkeys(site for view in views for site in view.sites))


def train_group(jobs: list[Job], max_members: int | None) -> list[Job]:
    """Train and evaluate as many of the jobs as fit, from the first on. Returns the others, in their order."""
    try:
        views = Views(jobs[0])
    except Exception as e:
        for job in jobs:
            if job.sites == jobs[0].sites:
                record_failure(job.folder, e)
        return [job for job in jobs if job.sites != jobs[0].sites]
    with ExitStack() as folders:
        members, others = open_members(jobs, views, max_members, folders)
        train_members(members, views)
    return others


def open_members(
    jobs: list[Job], views: Views, max_members: int | None, folders: ExitStack
) -> tuple[list[Member], list[Job]]:
    """Begin as many of the jobs as fit. Returns their members, and the jobs that are left for another group."""
    waiting, apart, members = list(jobs), list[Job](), list[Member]()
    device = training_device(jobs[0].cfg.trainer.accelerator)
    free = free_memory(device)
    while waiting:
        if (data := views.at(waiting[0])) is None:
            apart.append(waiting.pop(0))
            continue
        block = views.block_bytes([*(member.data for member in members), data], device)
        if not has_room(members, free - block, max_members):
            break
        job = waiting.pop(0)
        with logging_for(job.folder), failure_recorded(job.folder):
            member = open_member(job, data, first=not members)
            if member.run.complete:
                log.info("%s was completed by another process", job.folder)
                continue
            leader = members[0].run.folder if members else None
            folders.enter_context(member.run.begin(job.hydra, leader))
            members.append(member)
    return members, apart + waiting


def open_member(job: Job, data: StreamData, first: bool) -> Member:
    """Build a run that reads from a shared stream. The first one shows the progress."""
    run = open_run(job.cfg)
    progress = TrainingProgress() if first else Throughput()
    with report_typed_keys(job.typed):
        sae = initial_sae(job.cfg, run, data)
        if sae.reads_previous:
            raise UserError(
                f"a {type(sae).__name__} trains on pairs of rows, which a shared stream does not have: "
                "leave out hydra/launcher=shared_stream for it."
            )
        return build_member(job.cfg, run, sae, data, [progress])


def train_members(members: list[Member], views: Views) -> None:
    """Train members on one stream of all their sites, and evaluate those that do not fail."""
    if not members:
        return
    try:
        data = views.joined(member.data for member in members)
        block = f"{plural(data.n_sources, 'site')}, {data.block_bytes / 2**30:.2g} GiB a block"
        log.info("%d SAEs share one pass over %s (%s)", len(members), data.name, block)
        train_in_lockstep(members, data)
    except Exception as e:  # an error of the stream; errors of a member are recorded in `fit_member`
        for member in drop_failed(members):
            record_failure(member.run.folder, e)
    else:
        finish_together(members, data)


def free_memory(device: torch.device) -> int:
    """Return the free memory of the training device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def has_room(members: list[Member], free: int, max_members: int | None) -> bool:
    """Return whether one more SAE, of the size of the largest, fits.

    Counts 16 bytes per parameter (parameter, gradient, Adam's two moments) against half of the free memory. The other
    half is left for activations and temporary tensors.
    """
    if max_members is not None:
        return len(members) < max_members
    sizes = [sum(p.numel() for p in member.sae.parameters()) for member in members]
    return not sizes or 16 * (sum(sizes) + max(sizes)) < free / 2


def finish_together(members: list[Member], data: StreamData) -> None:
    """Calibrate, save and evaluate the members that did not fail, in one pass. An error of the pass fails them all."""
    alive = drop_failed(members)
    if not alive:
        return
    try:
        finish(alive, data, member_scope)
    except Exception as e:
        for member in drop_failed(alive):
            record_failure(member.run.folder, e)


@contextmanager
def member_scope(folder: Path) -> Iterator[None]:
    """Log what happens inside the block for one member, and record its failure instead of raising it."""
    with logging_for(folder), failure_recorded(folder):
        yield


def drop_failed(members: list[Member]) -> list[Member]:
    """Return the members without a `failed.txt`."""
    return [member for member in members if not (member.run.folder / FAILED).exists()]
