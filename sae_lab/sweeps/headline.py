"""The short table of a sweep, for the screen and report.md."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sae_lab import plots
from sae_lab.runtime.plain_text import NUMBER, for_code_span, for_markdown, for_terminal
from sae_lab.sweeps.labels import hide_values, label_jobs
from sae_lab.sweeps.status import JobStatus, count_statuses
from sae_lab.sweeps.table import cell_text, named_after_settings, setting_columns

# Metrics in the short table and their formats. report.csv has all columns with all digits.
HEADLINES = {
    "fvu": ".4f",
    "nmse": ".4f",
    "l0": ".1f",
    "dead_fraction": ".3f",
    "ce_degradation": ".4f",
    "loss_recovered": ".4f",
    "kl": ".4f",
}


def headline(table: pd.DataFrame, done: pd.DataFrame, own: Sequence[str] = ()) -> pd.DataFrame:
    """Return the short table as text: the settings that vary among the complete jobs, and the main metrics.

    Sorted by sae, k, n_latents and seed. Jobs that differ in their seed only become one row with their number and
    mean ± standard deviation.

    Args:
        own: metrics of one's own, which come last.
    """
    formats = HEADLINES | dict.fromkeys(own, ".4f")
    done = done.sort_values(["sae", "k", "n_latents", "seed"], kind="stable")
    varies = [c for c in setting_columns(table) if c != "expansion" and table[c].nunique(dropna=False) > 1]
    chosen = list(dict.fromkeys(["sae", "k", "n_latents", *varies]))
    metrics = [m for m in formats if plots.has_values(done, m)]
    twins = [c for c in chosen if c != "seed"]
    if done.duplicated(twins).any():
        groups = done.groupby(twins, dropna=False, sort=False)
        cells = groups.size().rename("seeds").reset_index()
        for metric in metrics:
            cells[metric] = [_mean_and_spread(values, formats[metric]) for _, values in groups[metric]]
        return cells.assign(**{c: cells[c].map(cell_text) for c in [*twins, "seeds"]})
    cells = done[chosen].map(cell_text).assign(**{m: done[m].map(partial(_rounded, form=formats[m])) for m in metrics})
    # The job's name is long, so it comes last. It is left out if it only repeats the settings.
    return cells if named_after_settings(done) else cells.assign(job=label_jobs(list(done["job"])))


def _mean_and_spread(values: pd.Series, form: str) -> str:
    """Return mean ± standard deviation with the same digits: 0.3175 ± 0.0000, not ± 2.9e-05."""
    mean = _rounded(values.mean(), form)
    spread = ".1e" if "e" in mean else form
    return mean + (f" ± {values.std():{spread}}" if values.count() > 1 else "")


def _rounded(value: float, form: str) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:{form}}"


def markdown(cells: pd.DataFrame, table: pd.DataFrame, jobs: list[JobStatus], folder: Path, figures: list[Path]) -> str:
    """Return report.md: the jobs whose status has a detail, the settings that all share, the table and the figures."""
    texts = [[for_markdown(str(cell)) for cell in row] for row in [list(cells.columns), *cells.to_numpy().tolist()]]
    texts = [[cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") for cell in row] for row in texts]
    rows = [texts[0], ["---:" if holds_numbers(cells[c]) else "---" for c in cells], *texts[1:]]
    same = [
        c for c in setting_columns(table) if c not in cells and c != "expansion" and table[c].nunique(dropna=False) == 1
    ]
    shared = ", ".join(f"`{for_code_span(f'{c}={cell_text(table[c].iloc[0])}')}`" for c in same)
    parts = [f"# {for_markdown(folder.resolve().name)}", count_statuses(jobs)]
    left = [job for job in jobs if job.status != "complete" or job.detail]
    names = label_jobs([job.job for job in left])
    is_single = (folder / ".hydra").is_dir()
    details = [hide_values(folder if is_single else folder / job.job, f"{job.status} {job.detail}") for job in left]
    missing = [f"- {for_markdown(name)}: {for_markdown(detail)}" for name, detail in zip(names, details, strict=True)]
    parts += ["\n".join(missing)] if missing else []
    parts += [f"{'The same for every job' if len(table) > 1 else 'Settings'}: {shared}."] if shared else []
    parts += ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    parts += ["Every setting and metric, with every digit: [report.csv](report.csv)."]
    parts += [f"![{path.stem}]({path.relative_to(folder).as_posix()})" for path in figures]
    return "\n\n".join(parts) + "\n"


def holds_numbers(cells: pd.Series) -> bool:
    """Return whether a column of text holds numbers, with or without a spread, and dashes only."""
    parts = [part for cell in cells for part in str(cell).split(" ± ")]
    return all(part == "–" or NUMBER.fullmatch(part) for part in parts)


def show_headline(cells: pd.DataFrame, written: list[Path]) -> None:
    """Print the table at its full width, so that numbers are never cut or wrapped, and the paths of written files."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in cells:
        grid.add_column(str(column).replace("_", " "), justify="right" if holds_numbers(cells[column]) else "left")
    for row in cells.to_numpy().tolist():
        grid.add_row(*map(for_terminal, row))
    console = Console(markup=False)
    needed = Measurement.get(console, console.options.update(max_width=10_000), grid).maximum
    console.width = max(console.width, needed)
    if len(cells):
        console.print(grid)
    for path in written:
        console.print(for_terminal(f"  {path}"), highlight=False, soft_wrap=True)
