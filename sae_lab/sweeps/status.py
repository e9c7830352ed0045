"""Jobs of a sweep: their folders and their status."""

import csv
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from sae_lab.cli.folder_names import split_overrides
from sae_lab.evaluation.findings import find_problems, not_finite
from sae_lab.runs.checkpoint import checkpoint_content
from sae_lab.runs.config import config_file, read_config
from sae_lab.runs.folder import FAILED, Run
from sae_lab.runs.lock import is_running
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_small
from sae_lab.runtime.os_errors import reason_of
from sae_lab.runtime.plain_text import for_terminal
from sae_lab.runtime.screen import console, format_duration

log = logging.getLogger(__name__)

PLAN = "jobs.txt"
UNREADABLE = "unreadable"
NUMBERS = {"fvu", "nmse", "l0", "dead_fraction", "ce_degradation", "loss_recovered", "kl", "n_latents", "d_in"}
"""Metrics and sizes that tables and figures show."""


def planned_jobs(sweep_dir: Path) -> list[Path]:
    """Return the job folders of the sweep's last command, in its order."""
    file = sweep_dir / PLAN
    names = file.read_text(errors="replace").splitlines() if file.is_file() else []
    inside = [name for name in names if name and not Path(name).is_absolute() and ".." not in Path(name).parts]
    return [sweep_dir / name for name in dict.fromkeys(inside)]  # a search may try the same values twice


def all_jobs(root: Path) -> list[Path]:
    """Return the folders of the planned jobs, then those of earlier commands.

    Raises:
        UserError: there is no job.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give sweep_dir=... the folder of a sweep or of one run.")
    folders = list(dict.fromkeys([*planned_jobs(root), *job_folders(root)]))
    if not folders:
        raise UserError(
            f"{root} holds no run (a folder with .hydra/config.yaml): give sweep_dir=... the folder of a sweep, "
            f"such as multirun/<date>/<time>, or of one run."
        )
    return folders


def job_folders(root: Path) -> list[Path]:
    """Return every run folder at or below `root`, in natural order (2 before 10, 0.25 before 0.5)."""
    return sorted(_runs(root), key=_natural_order)


def _runs(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:  # a symbolic link to a folder above
        return
    try:
        if is_run(folder):
            yield folder  # folders inside a run folder are not runs
            return
        children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    except OSError:
        if not above:
            raise
        yield folder  # may be a job: its status tells the reason
        return
    for child in children:
        yield from _runs(child, above | {here})


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a job: one with a config, or with a `failed.txt`."""
    return has_config(folder) or (folder / FAILED).is_file()


def has_config(folder: Path) -> bool:
    """Return whether a folder has a config, or something in its place that cannot be looked into."""
    try:
        os.lstat(config_file(folder))
    except OSError as e:
        return not isinstance(e, FileNotFoundError | NotADirectoryError)
    return True


def _natural_order(folder: Path) -> list[tuple[bool, float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", folder.as_posix())
    return [(not part[0].isdigit(), float(part) if part[0].isdigit() else 0.0, part) for part in parts]


class JobStatus(NamedTuple):
    """Status of a job: complete, failed, running, interrupted, waiting, or unreadable if its files are damaged.

    `detail` is the reason, the progress, or what is left out of the metrics of a complete job or looks wrong in them.
    """

    job: str
    status: str
    detail: str


def job_statuses(root: Path, folders: list[Path]) -> list[JobStatus]:
    """Return the status of each job of the sweep in `root`."""
    return [JobStatus(job_name(root, folder), *read_status(folder)) for folder in folders]


def job_name(root: Path, folder: Path) -> str:
    """Return a job's name: its path below `root`, or the name of the folder if `root` is the run itself."""
    return root.resolve().name if folder == root else folder.relative_to(root).as_posix()


def read_status(folder: Path) -> tuple[str, str]:
    """Return the status of the run in this folder, with its detail (see JobStatus)."""
    try:
        return _read_status(folder)
    except Exception as e:  # damage may raise anything; it must not end the report on the other jobs
        return UNREADABLE, reason_of(e)


def _read_status(folder: Path) -> tuple[str, str]:
    if (folder / FAILED).is_file():
        return "failed", (folder / FAILED).read_text(errors="replace").partition("\n")[0]
    if (folder / "metrics.json").is_file():
        return "complete", "; ".join(find_problems(read_finite_metrics(folder / "metrics.json")))
    if not has_config(folder):
        return "waiting", ""
    config = read_config(folder)
    n_steps = math.ceil(int(config.n_tokens) / config.batch_size)
    if not is_running(folder):
        return "interrupted", f"step {saved_step(folder)}/{n_steps}"
    step, rate = last_logged(folder / "metrics.csv")
    left = f", {format_duration((n_steps - step) * config.batch_size / rate)} left" if rate else ""
    return "running", f"step {step}/{n_steps}{left}"


def read_finite_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics.json.

    Raises:
        UserError: it is not JSON, or what must be a number in it is not, or not finite.
    """
    remedy = "evaluate that run again, or move its folder away."
    try:
        metrics = json.loads(read_small(path))
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): {remedy}") from e
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds no metrics: {remedy}")
    for name in NUMBERS & metrics.keys():
        if type(metrics[name]) not in (int, float):
            raise UserError(f"{path} has {name}={metrics[name]}, which must be a number: {remedy}")
    if wrong := not_finite(metrics):  # earlier versions wrote them
        raise UserError(f"{path} holds numbers that are not finite ({', '.join(wrong)}): {remedy}")
    return metrics


def saved_step(folder: Path) -> int:
    """Return the step of a run's checkpoint; 0 if there is none or it cannot be read."""
    try:
        return checkpoint_content(Run(folder, 0, False).last_checkpoint)["global_step"]
    except Exception:  # torch.load raises many types; the run itself reports a damaged file when it is resumed
        return 0


def last_logged(log_file: Path) -> tuple[int, float | None]:
    """Return the number of steps in a metrics.csv and the last tokens per second."""
    if not log_file.is_file():
        return 0, None
    with log_file.open(newline="") as f:
        rows = list(csv.DictReader(f))
    rates = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    return max((int(row["step"]) + 1 for row in rows), default=0), rates[-1] if rates else None


def show_statuses(jobs: list[JobStatus]) -> None:
    """Print a table of the jobs and the number of jobs of each status."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in JobStatus._fields:
        table.add_column(column, overflow="fold")
    for name, job in zip(drop_shared_overrides([job.job for job in jobs]), jobs, strict=True):
        table.add_row(for_terminal(name), job.status, for_terminal(job.detail))
    console.print(table)
    console.print(count_statuses(jobs), highlight=False)


def drop_shared_overrides(names: list[str]) -> list[str]:
    """Shorten folder names made of overrides (`k=8,sae=topk`) by the overrides that all of them share."""
    split = [split_overrides(name) for name in names]
    shared = set(split[0]).intersection(*split[1:]) if len(split) > 1 else set()
    return [",".join(override for override in overrides if override not in shared) or "-" for overrides in split]


def count_statuses(jobs: list[JobStatus]) -> str:
    """Return the number of jobs in total and of each status, as a sentence."""
    counts = Counter(job.status for job in jobs)
    return f"{len(jobs)} job{'s' * (len(jobs) != 1)}: {', '.join(f'{n} {status}' for status, n in counts.items())}."
