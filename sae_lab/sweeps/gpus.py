"""Train the groups of a sweep in parallel, one per GPU, with Ray: on this machine, or on the cluster at RAY_ADDRESS."""

import logging
import os
import signal
from collections.abc import Sequence
from typing import Any

import torch
from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from sae_lab.runs.folder import FAILED
from sae_lab.runtime.errors import Interrupted, SafeStop, UserError, first_line
from sae_lab.runtime.signals import deferred_signals, received_signal
from sae_lab.sweeps.failures import record_failure
from sae_lab.sweeps.member_logs import log_files
from sae_lab.sweeps.shared_stream import group_by_stream, train_jobs
from sae_lab.training.job import Job

log = logging.getLogger(__name__)

INSTALL = "pip install 'sae-lab[ray]'"


def train_on_gpus(jobs: list[Job], max_members: int | None, parallel: int | str, job_logging: Any) -> None:
    """Train all jobs, `parallel` groups at a time. Each job ends with metrics or with `failed.txt`.

    Args:
        jobs: the jobs, as for `train_jobs`.
        max_members: SAEs in a group; None: as many as the memory of the GPU holds.
        parallel: groups at a time; `auto`: one per GPU of this machine. Each group gets a GPU of its own, or a CPU core
            if there are no GPUs.
        job_logging: Hydra's logging config for jobs, used in the processes that Ray starts.

    Raises:
        UserError: `parallel` is invalid, or needs Ray, which is not installed.
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
    """Return how many groups may train at once."""
    if parallel == "auto":
        n = torch.cuda.device_count()
        if n > 1 and not ray_is_installed():
            log.warning("Using one of %d GPUs, because Ray is not installed: %s to use all of them.", n, INSTALL)
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
    """Split the groups into equal parts if there are more slots than groups. Each part needs a pass of its own."""
    n = max(1, slots // max(1, len(groups)))
    return [part for group in groups for part in split_group(group, n)]


def split_group(group: list[Job], n: int) -> list[list[Job]]:
    """Split a group into n parts of equal size, each in the group's order.

    Jobs of the same sites stay together, so that a part reads few sites. They are dealt out in turn, because neighbours
    in a sweep often have the same size.
    """
    dealt: dict[Any, list[int]] = {}
    for i, job in enumerate(group):
        dealt.setdefault(job.sites, []).append(i)
    order = [i for same in dealt.values() for k in range(n) for i in same[k::n]]
    size = -(-len(group) // n)
    return [[group[i] for i in sorted(order[k : k + size])] for k in range(0, len(group), size)]


def run_on_ray(parts: list[list[Job]], slots: int, max_members: int | None, job_logging: Any) -> None:
    """Train each part in a process started by Ray. If a process is lost, its unfinished jobs are recorded as failed."""
    import ray

    sigterm_handler = signal.getsignal(signal.SIGTERM)
    local = {"num_cpus": None if torch.cuda.is_available() else slots, "include_dashboard": False}
    try:
        ray.init(**({} if os.environ.get("RAY_ADDRESS") else local))
    except Exception as e:  # from Ray, gRPC or the operating system
        raise UserError(f"Ray does not start ({first_line(e)}): fix that, or give hydra.launcher.parallel=1.") from e
    signal.signal(signal.SIGTERM, sigterm_handler)  # ray.init replaced it
    resources = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    # max_calls=1: the process exits after its part and frees the memory of its GPU
    task = ray.remote(max_calls=1, max_retries=0, **resources)(train_part)
    runs = {task.remote(part, max_members, job_logging): part for part in parts}
    try:
        wait_for(runs)
    finally:
        ray.shutdown()


def wait_for(runs: dict[Any, list[Job]]) -> None:
    """Wait until every process has ended. After a signal each saves checkpoints and ends.

    Raises:
        SafeStop: a signal arrived.
    """
    import ray

    waiting, cancelled = list(runs), False
    try:
        with deferred_signals():  # polled below, because Ray hides exceptions that a signal handler raises
            while waiting:
                done, waiting = ray.wait(waiting, timeout=0.5)
                for run in done:
                    collect_result(run, runs[run])
                if received_signal() is not None and not cancelled:
                    cancelled = True
                    for run in waiting:
                        ray.cancel(run)  # sends SIGINT to the process
    except SafeStop as stop:
        raise SafeStop(f"{stop}, all groups are saved", stop.signum) from None


def collect_result(run: Any, part: list[Job]) -> None:
    """Record the failure of a process that ended early, unless this process cancelled it."""
    import ray

    try:
        ray.get(run)
    except ray.exceptions.TaskCancelledError:
        log.info("%d SAEs were stopped", len(part))
    except ray.exceptions.RayError as e:
        record_lost_jobs(part, e)


def train_part(jobs: list[Job], max_members: int | None, job_logging: Any) -> None:
    """Train the jobs of one part, in a process started by Ray."""
    configure_log(OmegaConf.create(job_logging))
    try:
        train_jobs(jobs, max_members)
    except Interrupted as e:  # from ray.cancel
        log.warning("%s", e)


def record_lost_jobs(part: list[Job], error: Exception) -> None:
    """Record `error` for the jobs that are neither complete nor recorded as failed."""
    lost = RuntimeError(f"the process of its group was lost: {first_line(getattr(error, 'cause', None) or error)}")
    lost.__cause__ = error
    for job in part:
        if not ((job.folder / "metrics.json").is_file() or (job.folder / FAILED).is_file()):
            record_failure(job.folder, lost)
