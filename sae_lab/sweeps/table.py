"""A sweep's folders → one table, a row a job."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from sae_lab.runs.config import config_file, read_config
from sae_lab.runtime.errors import UserError
from sae_lab.sweeps.status import job_folders, job_name, read_status

RESOLVED = ("sae", "k", "expansion", "n_latents", "seed")


@dataclass(frozen=True)
class JobRecord:
    """What one run folder tells: the overrides that made it, their config, and its metrics (empty until it is done)."""

    folder: Path
    overrides: dict[str, Any]
    choices: dict[str, Any]
    config: DictConfig
    metrics: dict[str, float]

    def setting(self, key: str) -> Any:
        """The value of a key or of a config group, overridden or not; None where this job has none."""
        # The config first: there `lr=${k}` has become a number. A group is a mapping there; only its choice has a name.
        value = OmegaConf.select(self.config, key, throw_on_resolution_failure=False)
        if value is None or OmegaConf.is_dict(value):
            value = self.overrides.get(key, self.choices.get(key))
        return _plain(value)

    def resolved(self) -> dict[str, Any]:
        """The dials that every sweep turns, from the place that knows best."""
        dials = {key: self.setting(key) for key in RESOLVED}
        if dials["sae"] is None:
            target = OmegaConf.select(self.config, "sae._target_")
            dials["sae"] = target and target.rpartition(".")[2]
        if not _takes_k(self.config.get("sae")):
            dials["k"] = None
        dials["n_latents"] = self.metrics.get("n_latents", dials["n_latents"])
        if {"n_latents", "d_in"} <= self.metrics.keys() and "expansion" not in self.overrides:
            # n_latents may have been given in place of an expansion, whose default then says nothing.
            dials["expansion"] = _number(self.metrics["n_latents"] / self.metrics["d_in"])
        return dials


def _takes_k(sae: Any) -> bool:
    """Whether an SAE's config has a k, its own or an inner SAE's: to the others the dial k means nothing."""
    if not isinstance(sae, DictConfig) or set(sae) == {"_target_"}:
        return True  # not known
    return "k" in sae or any(isinstance(node, DictConfig) and "k" in node for node in sae.values())


def collect_table(sweep_dir: Path | str) -> pd.DataFrame:
    """One row a job: `job`, its settings, `status`, then its metrics.

    The settings (every column between `job` and `status`) are the keys that any job overrode, filled in from its config
    where a job did not, and the resolved sae, k (blank for an SAE that takes none), expansion, n_latents and seed.
    `status` is that of sweep.py; a job that has not begun has no row. What an SAE scores under its batch-wise rule is
    in `train_mode/<metric>`.
    """
    root = Path(sweep_dir)
    jobs = [read_record(folder) for folder in started_jobs(root)]
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    rows = []
    for job in jobs:
        settings = {key: job.setting(key) for key in keys} | job.resolved()
        status = {"status": read_status(job.folder)[0]}
        rows.append({"job": job_name(root, job.folder)} | settings | status | job.metrics)
    columns = dict.fromkeys(column for row in rows for column in row)
    return pd.DataFrame({column: _series([row.get(column) for row in rows]) for column in columns})


def _series(values: list[Any]) -> pd.Series:
    """Whole numbers stay whole beside a blank: 512, not 512.0."""
    whole = {type(v) for v in values} == {int, type(None)}
    return pd.Series(values, dtype="Int64" if whole else None)


def started_jobs(root: Path) -> list[Path]:
    """The jobs that have a config to show."""
    return [folder for folder in job_folders(root) if config_file(folder).is_file()]


def read_record(folder: Path) -> JobRecord:
    hydra = folder / ".hydra"
    runtime = _load(hydra / "hydra.yaml")
    choices = OmegaConf.select(runtime, "hydra.runtime.choices", throw_on_resolution_failure=False) or {}
    return JobRecord(
        folder=folder,
        overrides=read_overrides(hydra / "overrides.yaml"),
        choices=dict(choices),
        config=read_config(folder),
        metrics=read_metrics(folder / "metrics.json"),
    )


def read_overrides(path: Path) -> dict[str, Any]:
    """The overrides of a run; none for one that Python code started, without a command line."""
    if not path.is_file():
        return {}
    overrides = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # `lr=${k}` is a text here
    assert isinstance(overrides, list), path
    return parse_overrides([str(o) for o in overrides])


def _load(path: Path) -> DictConfig:
    config = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
    assert isinstance(config, DictConfig), path
    return config


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`k=8`, `+sae.tied=true`, `sae@sae.inner=topk` → {key: value}, by Hydra's own grammar; `~key` → {"~key": True}."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {o.get_key_element().lstrip("+"): True if o.is_delete() else o.value() for o in parsed}


def read_metrics(path: Path) -> dict[str, float]:
    """The numbers of a metrics.json, nested ones as outer/inner; none when the file is not there."""
    if not path.is_file():
        return {}
    try:
        return dict(_numbers(json.loads(path.read_text(encoding="utf-8"))))
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not JSON ({e}): evaluate that run again, or move its folder away.") from e


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """A scalar as it is, a list or a mapping as one line of text: what a cell of a table can hold."""
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(str(_plain(v)) for v in value)}]"
    return str(value) if isinstance(value, dict) else value


def _number(x: float) -> float:
    return int(x) if x == int(x) else x


def setting_columns(table: pd.DataFrame) -> list[str]:
    """The columns that say how a job was set up, as against what came out of it."""
    return list(table.columns[1 : table.columns.get_loc("status")])


def complete_jobs(table: pd.DataFrame) -> pd.DataFrame:
    """The complete jobs; of those that agree in every setting, seed included, the first.

    They are one run repeated, not two samples: so are the jobs of a sweep over a dial that their SAE does not have.
    """
    done = table[table["status"] == "complete"]
    return done[~done.duplicated(setting_columns(table))]


def cell_text(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def named_after_settings(table: pd.DataFrame) -> bool:
    """Whether every job's folder spells out its overrides, as in `k=8,sae=topk`."""
    return bool(table["job"].str.fullmatch(r"[^/]*=[^/]*").all())
