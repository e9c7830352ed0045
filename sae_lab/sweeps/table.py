"""Collect the jobs of a sweep into one table with one row per job."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from sae_lab.evaluation.findings import numbers
from sae_lab.runs.config import config_file, read_config, read_environment_keys, read_yaml
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.os_errors import reason_of
from sae_lab.runtime.plain_text import for_csv
from sae_lab.runtime.private import public
from sae_lab.sweeps.labels import hide_values, label_jobs, label_settings
from sae_lab.sweeps.status import (
    UNREADABLE,
    JobStatus,
    has_config,
    job_folders,
    job_name,
    read_finite_metrics,
    read_status,
)

RESOLVED = ("sae", "k", "expansion", "n_latents", "seed")


@dataclass(frozen=True)
class JobRecord:
    """Content of a run folder: overrides, choices of config groups, config and metrics (empty until it is complete).

    `from_environment` are the keys of the config whose values came from the environment.
    """

    folder: Path
    overrides: dict[str, Any]
    choices: dict[str, Any]
    config: DictConfig
    metrics: dict[str, float]
    from_environment: list[str] = field(default_factory=list)
    status: str = UNREADABLE
    reason: str | None = None

    def value(self, key: str) -> Any:
        """Return the value of a key or the choice of a config group, overridden or not; None if this job has none."""
        # The config first, because interpolations are resolved there. A config group is a mapping there, without the
        # name of its choice.
        value = OmegaConf.select(self.config, key, throw_on_resolution_failure=False)
        if value is None or OmegaConf.is_dict(value):
            value = self.overrides.get(key, self.choices.get(key))
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def setting(self, key: str) -> Any:
        """Return the value of a key as the cell of a table."""
        return _plain(self.value(key))

    def shown(self, key: str) -> Any:
        """Return the setting as it may leave the machine."""
        return _plain(public(self.value(key), self.from_environment, key))

    def resolved(self) -> dict[str, Any]:
        """Return sae, k, expansion, n_latents and seed. Sizes come from metrics.json if the run is complete."""
        options = {key: self.setting(key) for key in RESOLVED}
        if options["sae"] is None:
            target = OmegaConf.select(self.config, "sae._target_")
            options["sae"] = target and target.rpartition(".")[2]
        if not _takes_k(self.config.get("sae")):
            options["k"] = None
        options["n_latents"] = self.metrics.get("n_latents", options["n_latents"])
        if {"n_latents", "d_in"} <= self.metrics.keys() and "expansion" not in self.overrides:
            # If n_latents was given instead, the default of expansion is not the real one.
            options["expansion"] = _number(self.metrics["n_latents"] / self.metrics["d_in"])
        for key in RESOLVED[1:]:
            if not (options[key] is None or isinstance(options[key], int | float)):
                raise UserError(f"{config_file(self.folder)} has {key}={options[key]}, which must be a number.")
        return options


def _takes_k(sae: Any) -> bool:
    """Return whether the config of an SAE, or of its inner SAE, has a k. Other SAEs ignore the option k."""
    if not isinstance(sae, DictConfig) or set(sae) == {"_target_"}:
        return True  # unknown
    return "k" in sae or any(isinstance(node, DictConfig) and "k" in node for node in sae.values())


def collect_table(sweep_dir: Path | str) -> pd.DataFrame:
    """Return a table with one row per started job: `job`, its settings, `status`, then its metrics.

    A job that cannot be read has a row without settings and metrics, and its reason in the column `reason`. Settings
    show no secrets and no folders (sweeps/labels.py).

    The settings are all columns between `job` and `status`: sae, k (blank for an SAE without k), expansion, n_latents,
    seed, and every key that at least one job overrode (jobs without that override get the value of their config).
    Metrics under the batch-wise rule are named `train_mode/<metric>`.
    """
    root = Path(sweep_dir)
    jobs = [try_to_read(folder) for folder in started_jobs(root)]
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    settings = [{key: job.setting(key) for key in keys} | job.resolved() for job in jobs]
    shown = [{key: job.shown(key) for key in keys if key not in RESOLVED} for job in jobs]
    table: dict[str, list[Any]] = {"job": [job_name(root, job.folder) for job in jobs]}
    for column in dict.fromkeys(column for row in settings for column in row):
        values = [row[column] for row in settings]
        table[column] = label_settings(values, [row.get(column, v) for row, v in zip(shown, values, strict=True)])
    table["status"] = [job.status for job in jobs]
    if any(job.reason for job in jobs):
        table["reason"] = [job.reason for job in jobs]
    for metric in dict.fromkeys(name for job in jobs for name in job.metrics):
        table[metric] = [job.metrics.get(metric) for job in jobs]
    return pd.DataFrame({column: _series(values) for column, values in table.items()})


def mark_unreadable(jobs: list[JobStatus], table: pd.DataFrame) -> list[JobStatus]:
    """Return the statuses with those of jobs that turned out to be damaged when their row was read."""
    damaged = table[table["status"] == UNREADABLE]
    reasons = dict(zip(damaged["job"], damaged["reason"], strict=True)) if len(damaged) else {}
    return [JobStatus(job.job, UNREADABLE, reasons[job.job]) if job.job in reasons else job for job in jobs]


def _series(values: list[Any]) -> pd.Series:
    """Return a Series in which integers stay integers beside missing values: 512, not 512.0."""
    whole = {type(v) for v in values} == {int, type(None)}
    return pd.Series(values, dtype="Int64" if whole else None)


def started_jobs(root: Path) -> list[Path]:
    """Return the folders of the jobs that have started."""
    return [folder for folder in job_folders(root) if has_config(folder)]


def try_to_read(folder: Path) -> JobRecord:
    """Read a run folder. The record of one that is damaged holds its reason, and neither settings nor metrics."""
    try:
        record = read_record(folder)
        record.resolved()
        return record
    except Exception as e:  # damage may raise anything; it must not end the report on the other jobs
        reason = hide_values(folder, reason_of(e))
        return JobRecord(folder, {}, {}, OmegaConf.create(), {}, reason=reason)


def read_record(folder: Path) -> JobRecord:
    """Read a run folder.

    Raises:
        UserError: its status cannot be told, because a file is damaged. Other damage may raise anything.
    """
    hydra, (status, detail) = folder / ".hydra", read_status(folder)
    if status == UNREADABLE:
        raise UserError(detail)
    return JobRecord(
        folder=folder,
        overrides=read_overrides(hydra / "overrides.yaml"),
        choices=read_choices(hydra / "hydra.yaml"),
        config=read_config(folder),
        metrics=read_metrics(folder / "metrics.json"),
        from_environment=read_environment_keys(folder),
        status=status,
    )


def read_choices(path: Path) -> dict[str, Any]:
    """Return the choices of config groups of a run; empty if it was started from Python."""
    if not path.is_file():
        return {}
    runtime = read_yaml(path)
    for key in ("hydra", "runtime", "choices"):
        runtime = runtime.get(key, {}) if isinstance(runtime, dict) else {}
    return {name: choice for name, choice in runtime.items() if isinstance(choice, str)}


def read_overrides(path: Path) -> dict[str, Any]:
    """Return the overrides of a run; empty if it was started from Python."""
    if not path.is_file():
        return {}
    overrides = read_yaml(path)  # `lr=${k}` stays a string
    if not isinstance(overrides, list):
        raise UserError(f"{path} holds no list of overrides: restore it, or train again.")
    return parse_overrides([str(o) for o in overrides])


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Parse overrides like `k=8`, `+sae.tied=true`, `sae@sae.inner=topk` to {key: value}; `~key` → {"~key": True}."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {o.get_key_element().lstrip("+"): True if o.is_delete() else o.value() for o in parsed}


def read_metrics(path: Path) -> dict[str, float]:
    """Return the numbers in a metrics.json, nested ones as outer/inner; empty if there is no file."""
    return dict(numbers(read_finite_metrics(path))) if path.is_file() else {}


def _plain(value: Any) -> Any:
    """Return a value for a table cell: scalars as they are, lists and mappings as one line of text."""
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(str(_plain(v)) for v in value)}]"
    return str(value) if isinstance(value, dict) else value


def _number(x: float) -> float:
    return int(x) if x == int(x) else x


def setting_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns that are settings, not metrics."""
    return list(table.columns[1 : table.columns.get_loc("status")])


def complete_jobs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the complete jobs, without repeats. Of jobs with equal settings, including the seed, the first is kept.

    Such jobs are the same run, not two samples: for example in a sweep over an option that their SAE does not have.
    """
    done = table[table["status"] == "complete"]
    return done[~done.duplicated(setting_columns(table))]


def cell_text(value: Any) -> str:
    """Format a cell; missing values become a dash."""
    if pd.isna(value):
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def named_after_settings(table: pd.DataFrame) -> bool:
    """Return whether all job names are made of overrides, such as `k=8,sae=topk`."""
    return bool(table["job"].str.fullmatch(r"[^/]*=[^/]*").all())


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the table with all columns and digits; no cell is a formula to a spreadsheet."""
    table = table.assign(job=label_jobs(list(table["job"])))
    text = table.map(lambda value: for_csv(value) if isinstance(value, str) else value).to_csv(index=False)
    write_atomically(path, text.encode())
