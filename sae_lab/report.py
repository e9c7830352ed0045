"""A sweep → one table and the figures: `python -m sae_lab.report sweep_dir=multirun/...`."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sae_lab import plots
from sae_lab.cli.entry import entry_point, folder_of
from sae_lab.sweeps.standing import Standing, all_jobs, counted, distinct, standings
from sae_lab.sweeps.standing import show as show_standings
from sae_lab.sweeps.table import RESOLVED, begun, collect, complete, settings

log = logging.getLogger(__name__)

# The columns of the table for people, and how each is written; report.csv has every column with every digit.
HEADLINES = {
    "fvu": ".4f",
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
    folder = folder_of(cfg, "sweep_dir")
    jobs = standings(folder, all_jobs(folder))
    if {job.status for job in jobs} != {"complete"}:
        show_standings(jobs)
    if not begun(folder):
        return
    table = collect(folder)
    done = complete(table)
    if copies := (table["status"] == "complete").sum() - len(done):
        log.warning("%d jobs repeat others in every setting and the seed: counted once (report.csv has them).", copies)
    figures = draw(done, folder)
    cells = headline(table, done)
    written = [folder / "report.csv", folder / "report.md", *figures]
    table.to_csv(written[0], index=False)
    written[1].write_text(markdown(cells, table, jobs, folder, figures), encoding="utf-8")
    show(cells, written)


# --- from a table to figures


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


def draw(done: pd.DataFrame, folder: Path) -> list[Path]:
    """Every figure that the complete jobs have the data for, as PNGs in folder/figures."""
    figures = folder / "figures"
    if len(done) == 1 and (folder / ".hydra").is_dir():
        return draw_run(folder)
    if len(done) < 2:
        return []
    done = done.assign(line=lines(done), architecture=done["sae"].map(str).map(plots.spelled))
    y = [metric for metric in COMPARED if plots.has_values(done, metric)]
    compared = draw_comparisons(done, figures, y) if y else []
    return compared + draw_frontier(done, figures) + draw_l0(done, folder)


def under_both_rules(done: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """The jobs under the rule that their SAE is deployed with; then, where the batch-wise rule scores otherwise, that.

    The write-up's third line: is one threshold as good as a choice over the batch?
    """
    columns = {f"train_mode/{metric}": metric for metric in metrics if f"train_mode/{metric}" in done}
    if not columns:
        return done
    differs = done[list(columns)].to_numpy() != done[list(columns.values())].to_numpy()
    again = done[differs.any(axis=1) & done[list(columns)].notna().all(axis=1)]
    again = again.assign(**{metric: again[column] for column, metric in columns.items()})
    return pd.concat([done, again.assign(line=again["line"] + ", batch-wise")], ignore_index=True)


def draw_comparisons(done: pd.DataFrame, figures: Path, y: list[str]) -> list[Path]:
    """The write-up's two figures wherever the sweep has them: over dictionary sizes at one k, over k at one size."""
    paths, both = [], under_both_rules(done, y)
    for fixed, x, name in (("k", "n_latents", "vs_n_latents_k"), ("n_latents", "k", "vs_k_n")):
        for value, jobs in ((float(str(v)), group) for v, group in both.groupby(fixed)):
            if jobs[x].nunique() > 1:
                path = figures / f"nmse_ce_{name}{value:.10g}.png"
                paths.append(plots.against(both, path, x, y, "line", {fixed: value}))
    if not paths:
        paths.append(plots.by_job(done.assign(label=_labels(done)), figures / "nmse_ce_by_job.png", y, "label"))
    return paths


def _labels(done: pd.DataFrame) -> pd.Series:
    if _named_after_settings(done):
        return pd.Series(distinct(list(done["job"])), done.index)
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


def draw_l0(done: pd.DataFrame, folder: Path) -> list[Path]:
    """How many latents are active on a token: for each line its largest dictionary, at every k."""
    files = [folder / job / "figures" / "l0_per_token.csv" for job in done["job"]]
    kept = done.assign(file=files)[[file.is_file() for file in files]]
    if kept.empty:
        return []
    kept = kept[kept["n_latents"] == kept.groupby("line")["n_latents"].transform("max")]
    which = zip(kept["file"], kept["line"], kept["k"], strict=True)
    tables = [pd.read_csv(file).assign(line=line, k=k) for file, line, k in which]
    return [plots.l0_by_line(pd.concat(tables), folder / "figures" / "l0_per_token.png")]


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


def headline(table: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """The complete jobs, sorted by sae, k, n_latents, seed: what varies among them and the main metrics, as text.

    Jobs that differ in nothing but their seed are one row: how many they are, and mean ± standard deviation.
    """
    done = done.sort_values(["sae", "k", "n_latents", "seed"], kind="stable")
    varies = [c for c in settings(table) if c != "expansion" and table[c].nunique(dropna=False) > 1]
    chosen = list(dict.fromkeys(["sae", "k", "n_latents", *varies]))
    metrics = [m for m in HEADLINES if plots.has_values(done, m)]
    twins = [c for c in chosen if c != "seed"]
    if done.duplicated(twins).any():
        groups = done.groupby(twins, dropna=False, sort=False)
        cells = groups.size().rename("seeds").reset_index()
        for metric in metrics:
            cells[metric] = [_mean_and_spread(values, HEADLINES[metric]) for _, values in groups[metric]]
        return cells.assign(**{c: cells[c].map(_text) for c in [*twins, "seeds"]})
    cells = done[chosen].map(_text).assign(**{m: done[m].map(partial(_rounded, form=HEADLINES[m])) for m in metrics})
    # Last, because it is long; left out where it would only repeat the settings.
    return cells if _named_after_settings(done) else cells.assign(job=done["job"])


def _mean_and_spread(values: pd.Series, form: str) -> str:
    return _rounded(values.mean(), form) + (f" ± {_rounded(values.std(), form)}" if values.count() > 1 else "")


def _text(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rounded(value: float, form: str) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:{form}}"


def markdown(cells: pd.DataFrame, table: pd.DataFrame, jobs: list[Standing], folder: Path, figures: list[Path]) -> str:
    """report.md: the table, the figures by relative path, what was the same for every job, and who is missing."""
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


def show(cells: pd.DataFrame, written: list[Path]) -> None:
    """The table on the screen, as wide as it is: a number is never cut to fit, nor wrapped."""
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
