"""Draw the figures of a sweep from its table."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lab import plots
from sae_lab.evaluation.rules import ACTIVATIONS
from sae_lab.runs.digests import METRICS
from sae_lab.runs.facts import shared_facts
from sae_lab.runs.tables import read_numbers
from sae_lab.runtime.errors import UserError
from sae_lab.sweeps.labels import label_jobs
from sae_lab.sweeps.status import drop_shared_overrides, read_finite_metrics
from sae_lab.sweeps.table import RESOLVED, cell_text, named_after_settings, setting_columns

L0_COLUMNS = ["l0", "bos", "other"]
COMPARED = ("nmse", "ce_degradation")


def line_names(table: pd.DataFrame, x: str | None = None) -> pd.Series:
    """Return the name of each job's line in a figure: the architecture, and other settings that must not be averaged.

    Jobs with equal sae, k and n_latents are averaged over their seeds only. If, say, the learning rate varies among
    them, it becomes part of the line's name (`TopK, lr=0.001`), unless it is the x axis.
    """
    twins = table.groupby(["sae", "k", "n_latents"], dropna=False)
    others = [c for c in setting_columns(table) if c not in (*RESOLVED, x) and twins[c].nunique(dropna=False).max() > 1]
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
    facts = shared_facts([folder / job for job in done["job"]])
    done = done.assign(line=line_names(done), architecture=done["sae"].map(str).map(plots.display_name))
    y = [metric for metric in COMPARED if plots.has_values(done, metric)]
    drawn = draw_comparisons(done, figures, y, facts) if y else []
    drawn += [path for metric in own_metrics_of(folder, done) for path in draw_metric(done, figures, metric, facts)]
    drawn += [path for setting in swept_numbers(done) for path in draw_against(done, figures, setting, y, facts)]
    drawn += draw_cross_use(done, folder, y, facts)
    return drawn + draw_frontier(done, figures, facts) + draw_l0(done, folder, facts)


def swept_numbers(done: pd.DataFrame) -> list[str]:
    """Return the settings besides k and sizes that have several numbers as values, such as batch_size."""
    others = [c for c in setting_columns(done) if c not in RESOLVED]
    return [c for c in others if pd.api.types.is_numeric_dtype(done[c]) and done[c].nunique() > 1]


def draw_against(done: pd.DataFrame, figures: Path, x: str, y: list[str], facts: str) -> list[Path]:
    """Plot the metrics against any setting that was swept, for each k and dictionary size."""
    again, paths = done.assign(line=line_names(done.drop(columns=["line", "architecture"]), x)), []
    for (k, n), jobs in again.groupby(["k", "n_latents"], dropna=False):
        fixed = {name: float(value) for name, value in (("k", k), ("n_latents", n)) if pd.notna(value)}
        if y and jobs[x].nunique() > 1:
            name = "_".join([f"nmse_ce_vs_{x.replace('.', '_')}", *(f"{c[0]}{v:.10g}" for c, v in fixed.items())])
            paths.append(plots.metrics_against(again, figures / f"{name}.png", x, y, "line", fixed, facts))
    return paths


def draw_cross_use(done: pd.DataFrame, folder: Path, y: list[str], facts: str) -> list[Path]:
    """Draw the write-up's figure of each SAE under the other's rule, from the files of `evaluate activation=...`."""
    under = [rows for rule in ACTIVATIONS if len(rows := rows_under(done, folder, rule, y))]
    if not under:
        return []
    used = done[done["job"].isin(pd.concat(under)["job"])]
    return draw_write_up(pd.concat([used, *under], ignore_index=True), folder / "figures", y, facts, "cross_use")


def rows_under(done: pd.DataFrame, folder: Path, rule: str, y: list[str]) -> pd.DataFrame:
    """Return the rows of the jobs that were evaluated under a rule, with the metrics there."""
    files = [folder / job / f"metrics_{rule}.json" for job in done["job"]]
    rows = done[[file.is_file() for file in files]]
    found = [read_finite_metrics(file) for file in files if file.is_file()]
    metrics = {name: [metrics.get(name) for metrics in found] for name in y}
    return rows.assign(line=rows["line"] + f" under {plots.display_name(rule)}", **metrics)


def own_metrics_of(folder: Path, done: pd.DataFrame) -> list[str]:
    """Return the metrics of one's own that jobs have, by the list in their metrics.json."""
    found = (read_finite_metrics(folder / job / METRICS).get("own_metrics", []) for job in done["job"])
    names = dict.fromkeys(name for names in found if isinstance(names, list) for name in names)
    return [name for name in names if plots.has_values(done, name)]


def draw_metric(done: pd.DataFrame, figures: Path, metric: str, facts: str) -> list[Path]:
    """Draw a metric of one's own as the comparisons draw theirs."""
    return draw_comparisons(done, figures, [metric], facts, metric)


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


def draw_comparisons(
    done: pd.DataFrame, figures: Path, y: list[str], facts: str = "", name: str = "nmse_ce"
) -> list[Path]:
    """Draw the write-up's two figures if the sweep has the data, else one point per job."""
    paths = draw_write_up(add_batch_wise_rows(done, y), figures, y, facts, name)
    by_job = figures / f"{name}_by_job.png"
    return paths or [plots.by_job(done.assign(label=_labels(done)), by_job, y, "label", facts)]


def draw_write_up(table: pd.DataFrame, figures: Path, y: list[str], facts: str, name: str) -> list[Path]:
    """Plot metrics against dictionary size at each k, and vice versa, where there are several values."""
    paths = []
    for fixed, x, end in (("k", "n_latents", "vs_n_latents_k"), ("n_latents", "k", "vs_k_n")):
        for value, jobs in ((float(str(v)), group) for v, group in table.groupby(fixed)):
            if jobs[x].nunique() > 1:
                path = figures / f"{name}_{end}{value:.10g}.png"
                paths.append(plots.metrics_against(table, path, x, y, "line", {fixed: value}, facts))
    return paths


def _labels(done: pd.DataFrame) -> pd.Series:
    if named_after_settings(done):
        return pd.Series(drop_shared_overrides(label_jobs(list(done["job"]))), done.index)
    label = pd.Series(label_jobs(list(done["job"])), done.index) + ": " + done["line"]
    for column in ("k", "n_latents", "seed"):
        if done[column].nunique() > 1:
            label += done[column].map(lambda v, column=column: f", {column}={cell_text(v)}")
    return label


def draw_frontier(done: pd.DataFrame, figures: Path, facts: str = "") -> list[Path]:
    """Plot loss_recovered against L0 for three or more jobs; nmse if there are no downstream metrics."""
    for metric in ("loss_recovered", "nmse"):
        if (
            plots.has_values(done, metric)
            and plots.has_values(done, "l0")
            and len(done.dropna(subset=[metric, "l0"])) > 2
        ):
            return [plots.frontier(done, figures / "frontier.png", metric, "architecture", "line", facts)]
    return []


def draw_l0(done: pd.DataFrame, folder: Path, facts: str = "") -> list[Path]:
    """Plot histograms of L0 for the largest dictionary of each line, at every k.

    A line with the same L0 on every token, TopK's, has no panel; the line above the figure names it.
    """
    found = [read_numbers(folder / job / "figures" / "l0_per_token.csv", L0_COLUMNS) for job in done["job"]]
    kept = done.assign(l0_table=pd.Series(found, done.index, dtype=object))[[table is not None for table in found]]
    if kept.empty:
        return []
    varies = kept["l0_table"].map(lambda table: int((table["bos"] + table["other"] > 0).sum()) > 1)
    constant = [line for line, any_varies in varies.groupby(kept["line"], sort=False).any().items() if not any_varies]
    kept = kept[~kept["line"].isin(constant)]
    if kept.empty:
        return []
    kept = kept[kept["n_latents"] == kept.groupby("line")["n_latents"].transform("max")]
    which = zip(kept["l0_table"], kept["line"], kept["k"], strict=True)
    tables = [table.assign(line=line, k=k) for table, line, k in which]
    said = "   ".join([facts, *(["not shown: " + ", ".join(constant) + ", with k on every token"] if constant else [])])
    return [plots.l0_by_line(pd.concat(tables), folder / "figures" / "l0_per_token.png", said.strip())]


def draw_run(folder: Path) -> list[Path]:
    """Draw the figures of a single run from its tables. Existing figures are kept."""
    figures = folder / "figures"
    sources: dict[str, tuple[Path, list[str], Any]] = {
        "training": (folder / "metrics.csv", [], plots.training_curves),
        "l0_per_token": (figures / "l0_per_token.csv", L0_COLUMNS, plots.l0_per_token),
        "latent_density": (figures / "latent_density.csv", ["density"], plots.latent_density),
        "activations": (figures / "activations.csv", ["log2", "entries"], plots.activations),
    }
    facts = shared_facts([folder])
    for name, (source, columns, plot) in sources.items():
        path = figures / f"{name}.png"
        if not path.is_file() and (table := read_numbers(source, columns)) is not None:
            plot(table, path, facts=facts)
    return sorted(figures.glob("*.png"))
