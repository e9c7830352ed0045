"""A sweep → one table and the figures: `python -m sae_lab.report sweep_dir=multirun/...`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sae_lab import plots
from sae_lab.cli import entry_point
from sae_lab.errors import UserError
from sae_lab.sweep import Standing, all_jobs, counted, job_folders, name_in, standing, standings
from sae_lab.sweep import show as show_standings

RESOLVED = ("sae", "k", "expansion", "n_latents", "seed")
# The columns of the table for people, and how each is written; report.csv has every column with every digit.
HEADLINES = {
    "nmse": ".4f",
    "l0": ".1f",
    "dead_fraction": ".3f",
    "ce_degradation": ".4f",
    "loss_recovered": ".4f",
    "kl": ".4f",
}
COMPARED = ("nmse", "ce_degradation")


@entry_point("report")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.sweep_dir)
    jobs = standings(folder, all_jobs(folder))
    if {job.status for job in jobs} != {"complete"}:
        show_standings(jobs)
    if not begun(folder):
        return
    table = collect(folder)
    figures = draw(table, folder)
    written = [folder / "report.csv", folder / "report.md", *figures]
    table.to_csv(written[0], index=False)
    written[1].write_text(markdown(table, jobs, folder, figures), encoding="utf-8")
    show(table, written)


# --- from folders to a table


@dataclass(frozen=True)
class Job:
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


def collect(sweep_dir: Path | str) -> pd.DataFrame:
    """One row a job: `job`, its settings, `status`, then its metrics.

    The settings (every column between `job` and `status`) are the keys that any job overrode, filled in from its config
    where a job did not, and the resolved sae, k (blank for an SAE that takes none), expansion, n_latents and seed.
    `status` is that of sweep.py; a job that has not begun has no row. What an SAE scores under its batch-wise rule is
    in `train_mode/<metric>`.
    """
    root = Path(sweep_dir)
    jobs = [read_job(folder) for folder in begun(root)]
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    rows = []
    for job in jobs:
        settings = {key: job.setting(key) for key in keys} | job.resolved()
        status = {"status": standing(job.folder)[0]}
        rows.append({"job": name_in(root, job.folder)} | settings | status | job.metrics)
    columns = dict.fromkeys(column for row in rows for column in row)
    return pd.DataFrame({column: _series([row.get(column) for row in rows]) for column in columns})


def _series(values: list[Any]) -> pd.Series:
    """Whole numbers stay whole beside a blank: 512, not 512.0."""
    whole = {type(v) for v in values} == {int, type(None)}
    return pd.Series(values, dtype="Int64" if whole else None)


def begun(root: Path) -> list[Path]:
    """The jobs that have a config to show."""
    return [folder for folder in job_folders(root) if (folder / ".hydra" / "config.yaml").is_file()]


def read_job(folder: Path) -> Job:
    hydra = folder / ".hydra"
    config, runtime = (_load(hydra / name) for name in ("config.yaml", "hydra.yaml"))
    choices = OmegaConf.select(runtime, "hydra.runtime.choices", throw_on_resolution_failure=False) or {}
    return Job(
        folder=folder,
        overrides=read_overrides(hydra / "overrides.yaml"),
        choices=dict(choices),
        config=config,
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


# --- from a table to figures


def settings(table: pd.DataFrame) -> list[str]:
    """The columns that say how a job was set up, as against what came out of it."""
    return list(table.columns[1 : table.columns.get_loc("status")])


def lines(table: pd.DataFrame) -> pd.Series:
    """Which line of a figure each job is a point of: its architecture, and whatever else its twins differ in.

    Twins are jobs of equal sae, k and n_latents. Only their seeds are averaged over: if a learning rate varies among
    them, it is part of the line's name (`TopK, lr=0.001`).
    """
    twins = table.groupby(["sae", "k", "n_latents"], dropna=False)
    others = [c for c in settings(table) if c not in RESOLVED and twins[c].nunique(dropna=False).max() > 1]
    leaves = [re.split(r"[.@/]", c)[-1] for c in others]
    names = [leaf if leaves.count(leaf) == 1 else c for leaf, c in zip(leaves, others, strict=True)]
    parts = [table["sae"].map(str).map(plots.spelled)]
    parts += [table[c].map(lambda v, name=name: f"{name}={_text(v)}") for c, name in zip(others, names, strict=True)]
    return pd.concat(parts, axis=1).agg(", ".join, axis=1)


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Every figure that the table has the data for, as PNGs in folder/figures."""
    done = table[table["status"] == "complete"]
    figures = folder / "figures"
    if len(done) == 1 and (folder / ".hydra").is_dir():
        return draw_run(folder)
    if len(done) < 2:
        return []
    done = done.assign(line=lines(done), architecture=done["sae"].map(str).map(plots.spelled))
    y = [metric for metric in COMPARED if plots.has_values(done, metric)]
    return (draw_comparisons(done, figures, y) if y else []) + draw_frontier(done, figures)


def draw_comparisons(done: pd.DataFrame, figures: Path, y: list[str]) -> list[Path]:
    """The write-up's two figures wherever the sweep has them: over dictionary sizes at one k, over k at one size."""
    paths = []
    for fixed, x, name in (("k", "n_latents", "vs_n_latents_k"), ("n_latents", "k", "vs_k_n")):
        for value, jobs in ((float(str(v)), group) for v, group in done.groupby(fixed)):
            if jobs[x].nunique() > 1:
                path = figures / f"nmse_ce_{name}{value:.10g}.png"
                paths.append(plots.against(done, path, x, y, "line", {fixed: value}))
    if not paths:
        paths.append(plots.by_job(done.assign(label=_labels(done)), figures / "nmse_ce_by_job.png", y, "label"))
    return paths


def _labels(done: pd.DataFrame) -> pd.Series:
    if _named_after_settings(done):
        return done["job"]
    label = done["job"] + ": " + done["line"]
    for column in ("k", "n_latents", "seed"):
        if done[column].nunique() > 1:
            label += done[column].map(lambda v, column=column: f", {column}={_text(v)}")
    return label


def _named_after_settings(table: pd.DataFrame) -> bool:
    """Whether every job's folder spells out its overrides, as in `k=8,sae=topk`."""
    return bool(table["job"].str.fullmatch(r"[^/]*=[^/]*").all())


def draw_frontier(done: pd.DataFrame, figures: Path) -> list[Path]:
    """What three jobs or more buy with their L0; the reconstruction alone where no language model was at hand."""
    for metric in ("loss_recovered", "nmse"):
        if (
            plots.has_values(done, metric)
            and plots.has_values(done, "l0")
            and len(done.dropna(subset=[metric, "l0"])) > 2
        ):
            return [plots.frontier(done, figures / "frontier.png", metric, "architecture", "line")]
    return []


def draw_run(folder: Path) -> list[Path]:
    """One run's own figures, from its tables; those that it drew itself are kept."""
    figures = folder / "figures"
    sources = {
        "training": (folder / "metrics.csv", plots.training_curves),
        "l0_per_token": (figures / "l0_per_token.csv", plots.l0_per_token),
        "latent_density": (figures / "latent_density.csv", plots.latent_density),
    }
    for name, (source, plot) in sources.items():
        path = figures / f"{name}.png"
        if source.is_file() and source.stat().st_size and not path.is_file():
            plot(pd.read_csv(source), path)
    return sorted(figures.glob("*.png"))


# --- from a table to people


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The complete jobs, sorted by sae, k, n_latents, seed: what varies among them and the main metrics, as text."""
    done = table[table["status"] == "complete"].sort_values(["sae", "k", "n_latents", "seed"], kind="stable")
    varies = [c for c in settings(table) if c != "expansion" and table[c].nunique(dropna=False) > 1]
    chosen = list(dict.fromkeys(["sae", "k", "n_latents", *varies]))
    cells = {c: done[c].map(_text) for c in chosen}
    cells |= {
        m: done[m].map(lambda v, form=form: _rounded(v, form))
        for m, form in HEADLINES.items()
        if plots.has_values(done, m)
    }
    # Last, because it is long; left out where it would only repeat the settings.
    return pd.DataFrame(cells if _named_after_settings(done) else cells | {"job": done["job"]})


def _text(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rounded(value: float, form: str) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:{form}}"


def markdown(table: pd.DataFrame, jobs: list[Standing], folder: Path, figures: list[Path]) -> str:
    """report.md: the table, the figures by relative path, what was the same for every job, and who is missing."""
    cells = headline(table)
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    same = [c for c in settings(table) if c not in cells and c != "expansion" and table[c].nunique(dropna=False) == 1]
    dials = ", ".join(f"`{c}={_text(table[c].iloc[0])}`" for c in same)
    parts = [f"# {folder.resolve().name}", counted(jobs)]
    missing = [f"- {job.job}: {job.status} {job.detail}".rstrip() for job in jobs if job.status != "complete"]
    parts += ["\n".join(missing)] if missing else []
    parts += [f"{'The same for every job' if len(table) > 1 else 'Its settings'}: {dials}."] if dials else []
    parts += ["\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)]
    parts += ["Every setting and metric, with every digit: [report.csv](report.csv)."]
    parts += [f"![{path.stem}]({path.relative_to(folder).as_posix()})" for path in figures]
    return "\n\n".join(parts) + "\n"


def show(table: pd.DataFrame, written: list[Path]) -> None:
    """The table on the screen, as wide as it is: a number is never cut to fit, nor wrapped."""
    cells = headline(table)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in cells:
        grid.add_column(str(column).replace("_", " "), justify="right" if column in HEADLINES else "left")
    for row in cells.to_numpy().tolist():
        grid.add_row(*row)
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=10_000), grid).maximum
    console.width = max(console.width, needed)
    if len(cells):
        console.print(grid)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
