"""Jobs of a sweep: their folders and their status."""

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from sae_lab.cli.folder_names import split_overrides
from sae_lab.runs.checkpoint import checkpoint_content
from sae_lab.runs.config import config_file, read_config
from sae_lab.runs.folder import FAILED, Run, is_running
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.plain_text import for_terminal
from sae_lab.runtime.screen import console, format_duration

log = logging.getLogger(__name__)

PLAN = "jobs.txt"


def planned_jobs(sweep_dir: Path) -> list[Path]:
    """Return the job folders of the sweep's last command, in its order."""
    file = sweep_dir / PLAN
    return [sweep_dir / name for name in file.read_text().splitlines()] if file.is_file() else []


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


def _runs(folder: Path) -> Iterator[Path]:
    if config_file(folder).is_file() or (folder / FAILED).is_file():
        yield folder  # folders inside a run folder are not runs
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith("."):
            yield from _runs(child)


def _natural_order(folder: Path) -> list[tuple[bool, float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", folder.as_posix())
    return [(not part[0].isdigit(), float(part) if part[0].isdigit() else 0.0, part) for part in parts]


class JobStatus(NamedTuple):
    """Status of a job: complete, failed, running, interrupted or waiting; `detail` is the reason or the progress."""

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
    """Return the status of the run in this folder, with a detail: the reason, or the step and the time left."""
    if (folder / FAILED).is_file():
        return "failed", (folder / FAILED).read_text().splitlines()[0]
    if (folder / "metrics.json").is_file():
        return "complete", ""
    if not config_file(folder).is_file():
        return "waiting", ""
    config = read_config(folder)
    n_steps = math.ceil(int(config.n_tokens) / config.batch_size)
    if not is_running(folder):
        return "interrupted", f"step {saved_step(folder)}/{n_steps}"
    step, rate = last_logged(folder / "metrics.csv")
    left = f", {format_duration((n_steps - step) * config.batch_size / rate)} left" if rate else ""
    return "running", f"step {step}/{n_steps}{left}"


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
