"""Draw the figures of a sweep from its table."""

import re
from pathlib import Path

import pandas as pd

from sae_lab import plots
from sae_lab.runs.tables import read_numbers
from sae_lab.runtime.errors import UserError
from sae_lab.sweeps.labels import label_jobs
from sae_lab.sweeps.status import drop_shared_overrides
from sae_lab.sweeps.table import RESOLVED, cell_text, named_after_settings, setting_columns

L0_COLUMNS = ["l0", "bos", "other"]
COMPARED = ("nmse", "ce_degradation")


def line_names(table: pd.DataFrame) -> pd.Series:
    """Return the name of each job's line in a figure: the architecture, and other settings that must not be averaged.

    Jobs with equal sae, k and n_latents are averaged over their seeds only. If, say, the learning rate varies among
    them, it becomes part of the line's name (`TopK, lr=0.001`).
    """
    twins = table.groupby(["sae", "k", "n_latents"], dropna=False)
    others = [c for c in setting_columns(table) if c not in RESOLVED and twins[c].nunique(dropna=False).max() > 1]
    leaves = [re.split(r"[.@/]", c)[-1] for c in others]
    names = [leaf if leaves.count(leaf) == 1 else c for leaf, c in zip(leaves, others, strict=True)]
    parts = [table["sae"].map(str).map(plots.display_name)]
    parts += [
        table[c].map(lambda v, name=name: f"{name}={cell_text(v)}") for c, name in zip(others, names, strict=True)
    ]
    return pd.concat(parts, axis=1).agg(", ".join, axis=1)


def draw_sweep(done: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw every figure for which the complete jobs have data, as PNG files in folder/figures.

    Raises:
        UserError: folder/figures is a link, which may lead anywhere.
    """
    figures = folder / "figures"
    if figures.is_symlink():
        raise UserError(f"{figures} is a link: replace it by a folder.")
    if len(done) == 1 and (folder / ".hydra").is_dir():
        return draw_run(folder)
    if len(done) < 2:
        return []
    done = done.assign(line=line_names(done), architecture=done["sae"].map(str).map(plots.display_name))
    y = [metric for metric in COMPARED if plots.has_values(done, metric)]
    compared = draw_comparisons(done, figures, y) if y else []
    return compared + draw_frontier(done, figures) + draw_l0(done, folder)


def add_batch_wise_rows(done: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Add a row for each job that scores differently under the batch-wise rule, with the metrics of that rule.

    This is the BatchTopK write-up's third line: is one threshold as good as a selection over the batch?
    """
    columns = {f"train_mode/{metric}": metric for metric in metrics if f"train_mode/{metric}" in done}
    if not columns:
        return done
    differs = done[list(columns)].to_numpy() != done[list(columns.values())].to_numpy()
    again = done[differs.any(axis=1) & done[list(columns)].notna().all(axis=1)]
    again = again.assign(**{metric: again[column] for column, metric in columns.items()})
    return pd.concat([done, again.assign(line=again["line"] + ", batch-wise")], ignore_index=True)


def draw_comparisons(done: pd.DataFrame, figures: Path, y: list[str]) -> list[Path]:
    """Draw the write-up's two figures if the sweep has the data: against dictionary size at each k, and vice versa."""
    paths, both = [], add_batch_wise_rows(done, y)
    for fixed, x, name in (("k", "n_latents", "vs_n_latents_k"), ("n_latents", "k", "vs_k_n")):
        for value, jobs in ((float(str(v)), group) for v, group in both.groupby(fixed)):
            if jobs[x].nunique() > 1:
                path = figures / f"nmse_ce_{name}{value:.10g}.png"
                paths.append(plots.metrics_against(both, path, x, y, "line", {fixed: value}))
    if not paths:
        paths.append(plots.by_job(done.assign(label=_labels(done)), figures / "nmse_ce_by_job.png", y, "label"))
    return paths


def _labels(done: pd.DataFrame) -> pd.Series:
    if named_after_settings(done):
        return pd.Series(drop_shared_overrides(label_jobs(list(done["job"]))), done.index)
    label = pd.Series(label_jobs(list(done["job"])), done.index) + ": " + done["line"]
    for column in ("k", "n_latents", "seed"):
        if done[column].nunique() > 1:
            label += done[column].map(lambda v, column=column: f", {column}={cell_text(v)}")
    return label


def draw_frontier(done: pd.DataFrame, figures: Path) -> list[Path]:
    """Plot loss_recovered against L0 for three or more jobs; nmse if there are no downstream metrics."""
    for metric in ("loss_recovered", "nmse"):
        if (
            plots.has_values(done, metric)
            and plots.has_values(done, "l0")
            and len(done.dropna(subset=[metric, "l0"])) > 2
        ):
            return [plots.frontier(done, figures / "frontier.png", metric, "architecture", "line")]
    return []


def draw_l0(done: pd.DataFrame, folder: Path) -> list[Path]:
    """Plot histograms of L0 for the largest dictionary of each line, at every k."""
    found = [read_numbers(folder / job / "figures" / "l0_per_token.csv", L0_COLUMNS) for job in done["job"]]
    kept = done.assign(l0_table=pd.Series(found, done.index, dtype=object))[[table is not None for table in found]]
    if kept.empty:
        return []
    kept = kept[kept["n_latents"] == kept.groupby("line")["n_latents"].transform("max")]
    which = zip(kept["l0_table"], kept["line"], kept["k"], strict=True)
    tables = [table.assign(line=line, k=k) for table, line, k in which]
    return [plots.l0_by_line(pd.concat(tables), folder / "figures" / "l0_per_token.png")]


def draw_run(folder: Path) -> list[Path]:
    """Draw the figures of a single run from its tables. Existing figures are kept."""
    figures = folder / "figures"
    sources = {
        "training": (folder / "metrics.csv", [], plots.training_curves),
        "l0_per_token": (figures / "l0_per_token.csv", L0_COLUMNS, plots.l0_per_token),
        "latent_density": (figures / "latent_density.csv", ["density"], plots.latent_density),
    }
    for name, (source, columns, plot) in sources.items():
        path = figures / f"{name}.png"
        if not path.is_file() and (table := read_numbers(source, columns)) is not None:
            plot(table, path)
    return sorted(figures.glob("*.png"))
