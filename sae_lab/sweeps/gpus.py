"""The groups of a sweep side by side, one per GPU, through Ray: on this machine, or where RAY_ADDRESS points."""

import logging
import os
import signal
from collections.abc import Sequence
from typing import Any

import torch
from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from sae_lab.runs.folder import FAILED
from sae_lab.runtime.errors import Interrupted, UserError, first_line
from sae_lab.runtime.signals import Signals
from sae_lab.sweeps.failures import record_failure
from sae_lab.sweeps.member_logs import log_files
from sae_lab.sweeps.shared_stream import Job, group_by_stream, train_jobs

log = logging.getLogger(__name__)

INSTALL = "pip install 'sae-lab[ray]'"


def train_on_gpus(jobs: list[Job], max_members: int | None, parallel: int | str, job_logging: Any) -> None:
    """Every job to its metrics or its `failed.txt`, `parallel` groups at a time.

    Args:
        jobs: as `train_jobs` takes them.
        max_members: SAEs in a group; None takes as many as the memory of its GPU holds.
        parallel: groups at a time; `auto` is one per GPU of this machine. Each has a GPU of its own where there are
            any, else a processor.
        job_logging: Hydra's description of a job's log, for the processes that Ray starts.

    Raises:
        UserError: `parallel` is no number of groups, or Ray, which it needs, is not installed.
    """
    slots = count_slots(parallel)
    if slots == 1:
        train_jobs(jobs, max_members)
        return
    with log_files([job.folder for job in jobs]):
        parts = split_groups(group_by_stream(jobs), slots)
        if parts:
            log.info("%d groups, %d at a time", len(parts), slots)
            run_on_ray(parts, slots, max_members, job_logging)


def count_slots(parallel: int | str) -> int:
    """How many groups may train at once."""
    if parallel == "auto":
        n = torch.cuda.device_count()
        if n > 1 and not ray_is_installed():
            log.warning("One of %d GPUs trains, as Ray is not installed: %s for all of them.", n, INSTALL)
            return 1
        return max(n, 1)
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise UserError(f"hydra.launcher.parallel={parallel} must be auto or a whole number of at least 1.")
    if parallel > 1 and not ray_is_installed():
        raise UserError(f"hydra.launcher.parallel={parallel} needs Ray, which is not installed: {INSTALL}.")
    return parallel


def ray_is_installed() -> bool:
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return True


def split_groups(groups: Sequence[list[Job]], slots: int) -> list[list[Job]]:
    """The groups, in equal parts where there are fewer of them than slots: each part pays a pass of its own."""
    n = max(1, slots // max(1, len(groups)))
    return [part for group in groups for i in range(n) if (part := group[i::n])]


def run_on_ray(parts: list[list[Job]], slots: int, max_members: int | None, job_logging: Any) -> None:
    """Each part in a process that Ray starts; what ends such a process is recorded as the failure of its jobs."""
    import ray

    at_sigterm = signal.getsignal(signal.SIGTERM)
    own = {"num_cpus": None if torch.cuda.is_available() else slots, "include_dashboard": False}
    try:
        ray.init(**({} if os.environ.get("RAY_ADDRESS") else own))
    except Exception as e:  # of Ray, of gRPC, of the operating system
        raise UserError(f"Ray does not start ({first_line(e)}): mend that, or give hydra.launcher.parallel=1.") from e
    signal.signal(signal.SIGTERM, at_sigterm)  # ray.init has put its own there
    lease = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    # A process ends with its part, and gives the memory of its GPU back. A part that was lost is not tried again.
    task = ray.remote(max_calls=1, max_retries=0, **lease)(train_part)
    runs = {task.remote(part, max_members, job_logging): part for part in parts}
    try:
        wait_for(runs)
    finally:
        ray.shutdown()


def wait_for(runs: dict[Any, list[Job]]) -> None:
    """Until every process has ended; after SIGINT or SIGTERM each saves and ends. Ray hides what a handler raises.

    Raises:
        Interrupted: a signal arrived.
    """
    import ray

    signals, waiting, told = Signals(), list(runs), False
    signals.listen()
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=0.5)
            for run in done:
                collect_result(run, runs[run])
            if signals.received is not None and not told:
                told = True
                for run in waiting:
                    ray.cancel(run)  # SIGINT to its process
    finally:
        signals.restore()
    if signals.received is not None:
        name = signal.Signals(signals.received).name
        raise Interrupted(f"Stopped by {name}, all groups are saved", signals.received)


def collect_result(run: Any, part: list[Job]) -> None:
    """Record what has ended a process before its work was done, unless it was ours to cancel."""
    import ray

    try:
        ray.get(run)
    except ray.exceptions.TaskCancelledError:
        log.info("%d SAEs were stopped", len(part))
    except ray.exceptions.RayError as e:
        record_lost_jobs(part, e)


def train_part(jobs: list[Job], max_members: int | None, job_logging: Any) -> None:
    """What one process does."""
    configure_log(OmegaConf.create(job_logging))
    try:
        train_jobs(jobs, max_members)
    except Interrupted as e:  # by ray.cancel
        log.warning("%s", e)


def record_lost_jobs(part: list[Job], error: Exception) -> None:
    """Record `error`, in a line, for those jobs that are neither complete nor known to have failed."""
    lost = RuntimeError(f"the process of its group was lost: {first_line(getattr(error, 'cause', None) or error)}")
    lost.__cause__ = error
    for job in part:
        if not ((job.folder / "metrics.json").is_file() or (job.folder / FAILED).is_file()):
            record_failure(job.folder, lost)
