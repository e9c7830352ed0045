"""A sweep's folder: which jobs it has, how each of them stands, and why those that failed did."""

import csv
import logging
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import box
from rich.markup import escape
from rich.table import Table

from sae_lab.cli.entry import works_in
from sae_lab.cli.explain import explain
from sae_lab.cli.folder_names import each_override
from sae_lab.runs.checkpoint import checkpoint_content
from sae_lab.runs.folder import FAILED, Run, is_running
from sae_lab.runtime.errors import Busy, UserError
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.screen import clock, console
from sae_lab.sweeps.search import best

log = logging.getLogger(__name__)

PLAN = "jobs.txt"


class SweepSummary(Callback):
    """Notes in `jobs.txt` which jobs a sweep will have; at its end shows a table, and exits with 1 if any failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        works_in(f"hydra.sweep.dir={config.hydra.sweep.dir}")
        names = planned(config)
        write_atomically(Path(config.hydra.sweep.dir) / PLAN, "".join(f"{name}\n" for name in names).encode())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        root = Path(config.hydra.sweep.dir)
        folders = plan(root) or job_folders(root)
        jobs = standings(root, folders)
        show(jobs)
        if not grid(config) and (sentence := best(folders, config.get("goal_l0"))):
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        if any(job.status == "failed" for job in jobs):
            sys.exit(1)


def planned(config: DictConfig) -> list[str]:
    """The folder names of the jobs that Hydra's own sweeper will start; none where another sweeper decides as it goes.

    Composing the config of every job would tell as well, but takes a third of a second each.
    """
    if not grid(config):
        return []
    parser = OverridesParser.create()
    overrides = parser.parse_overrides(list(config.hydra.overrides.task))
    [jobs] = BasicSweeper.split_arguments(overrides, None)
    named = dict(config.hydra.job.config.override_dirname)
    names, job_config = [], config.copy()
    OmegaConf.set_readonly(job_config.hydra.job, False)
    before = HydraConfig.instance().cfg
    for i, job in enumerate(jobs):
        with open_dict(job_config):
            job_config.hydra.job.override_dirname = get_overrides_dirname(parser.parse_overrides(job), **named)
            job_config.hydra.job.num = job_config.hydra.job.id = i
        HydraConfig.instance().set_config(job_config)
        names.append(str(OmegaConf.select(job_config, "hydra.sweep.subdir")))
    HydraConfig.instance().cfg = before
    return names


def grid(config: DictConfig) -> bool:
    """Whether all jobs are known from the start; else this is a search."""
    return config.hydra.sweeper._target_.endswith(".BasicSweeper")


def plan(sweep_dir: Path) -> list[Path]:
    """The folders of the jobs that the sweep's last command has, in its order."""
    file = sweep_dir / PLAN
    return [sweep_dir / name for name in file.read_text().splitlines()] if file.is_file() else []


def all_jobs(root: Path) -> list[Path]:
    """The folders of the jobs that are planned, and of those that earlier commands left.

    Raises:
        UserError: there are none.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give sweep_dir=... the folder of a sweep or of one run.")
    folders = list(dict.fromkeys([*plan(root), *job_folders(root)]))
    if not folders:
        raise UserError(
            f"{root} holds no run (a folder with .hydra/config.yaml): give sweep_dir=... the folder of a sweep, "
            f"such as multirun/<date>/<time>, or of one run."
        )
    return folders


def job_folders(root: Path) -> list[Path]:
    """Every run folder at or below `root`, in the order in which people count (2 before 10, 0.25 before 0.5)."""
    return sorted(_runs(root), key=_counting)


def _runs(folder: Path) -> Iterator[Path]:
    if (folder / ".hydra" / "config.yaml").is_file() or (folder / FAILED).is_file():
        yield folder  # what lies below a run is its own
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith("."):
            yield from _runs(child)


def _counting(folder: Path) -> list[tuple[bool, float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", folder.as_posix())
    return [(not part[0].isdigit(), float(part) if part[0].isdigit() else 0.0, part) for part in parts]


# --- what went wrong


@contextmanager
def failure_recorded(folder: Path) -> Iterator[None]:
    """Keep an exception from the caller, and write its reason to `failed.txt`, which an earlier attempt may have left.

    A folder in which another process trains is that process's affair.
    """
    (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except Busy as e:
        log.warning("%s", e)
    except Exception as e:
        record_failure(folder, e)


def record_failure(folder: Path, error: Exception) -> None:
    """Write `failed.txt`: the reason in a line, and for what was no user's mistake the traceback."""
    sentence = explain(error, "train", [])
    reason = sentence or " ".join(f"{type(error).__name__}: {error}".split())
    details = "" if sentence else "\n" + "".join(traceback.format_exception(error))
    write_atomically(folder / FAILED, f"{reason}\n{details}".encode())
    log.error("%s failed: %s", folder.name, reason)


# --- how the jobs stand


class Standing(NamedTuple):
    """complete | failed | running | interrupted | waiting, and what else is to say."""

    job: str
    status: str
    detail: str


def standings(root: Path, folders: list[Path]) -> list[Standing]:
    return [Standing(name_in(root, folder), *standing(folder)) for folder in folders]


def name_in(root: Path, folder: Path) -> str:
    """What a job is called; a run that is looked at by itself has the name of its folder."""
    return root.resolve().name if folder == root else folder.relative_to(root).as_posix()


def standing(folder: Path) -> tuple[str, str]:
    """How the run in this folder stands, and what else is to say: a reason, or a place and the time that is left."""
    if (folder / FAILED).is_file():
        return "failed", (folder / FAILED).read_text().splitlines()[0]
    if (folder / "metrics.json").is_file():
        return "complete", ""
    if not (folder / ".hydra" / "config.yaml").is_file():
        return "waiting", ""
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    n_steps = math.ceil(int(config.n_tokens) / config.batch_size)
    if not is_running(folder):
        return "interrupted", f"step {saved_step(folder)}/{n_steps}"
    step, rate = last_logged(folder / "metrics.csv")
    left = f", {clock((n_steps - step) * config.batch_size / rate)} left" if rate else ""
    return "running", f"step {step}/{n_steps}{left}"


def saved_step(folder: Path) -> int:
    """The step of a run's checkpoint, which it continues from; 0 where there is none, or one that cannot be read."""
    try:
        return checkpoint_content(Run(folder, 0, False).last_checkpoint)["global_step"]
    except Exception:  # torch.load raises whatever the broken part does; a run that is started says what is wrong
        return 0


def last_logged(log_file: Path) -> tuple[int, float | None]:
    """How many steps a metrics.csv knows of, and at how many tokens per second they went."""
    if not log_file.is_file():
        return 0, None
    with log_file.open(newline="") as f:
        rows = list(csv.DictReader(f))
    rates = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    return max((int(row["step"]) + 1 for row in rows), default=0), rates[-1] if rates else None


def show(jobs: list[Standing]) -> None:
    """A table of the jobs, and how many there are of each status."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in Standing._fields:
        table.add_column(column, overflow="fold")
    for name, job in zip(distinct([job.job for job in jobs]), jobs, strict=True):
        table.add_row(escape(name), job.status, escape(job.detail))
    console.print(table)
    console.print(counted(jobs), highlight=False)


def distinct(names: list[str]) -> list[str]:
    """Folder names that spell overrides, `k=8,sae=topk`, without those that all of them share."""
    parts = [each_override(name) for name in names]
    shared = set(parts[0]).intersection(*parts[1:]) if len(parts) > 1 else set()
    return [",".join(part for part in own if part not in shared) or "-" for own in parts]


def counted(jobs: list[Standing]) -> str:
    """How many jobs there are, and of each status."""
    counts = Counter(job.status for job in jobs)
    return f"{len(jobs)} job{'s' * (len(jobs) != 1)}: {', '.join(f'{n} {status}' for status, n in counts.items())}."
