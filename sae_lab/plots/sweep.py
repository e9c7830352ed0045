"""A sweep's figures: metrics against what was swept, a line an architecture, error bars over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from sae_lab.plots.style import COLUMN, LABELS, MUTED, PAGE, PALETTE, PLAIN, legend_below, legend_rows, page

MARKERS = "os^DvPX"
DASHES = ("-", "--", ":", "-.")
FIXED = {"n_latents": "dictionary size"}


def against(table: pd.DataFrame, path: Path, x: str, y: Sequence[str], lines: str, fixed: Mapping[str, float]) -> Path:
    """The metrics `y` side by side against `x`, a line for each value of the column `lines`, mean ± std over seeds.

    Rows that differ from `fixed` ({"k": 16}) are left out; they still reserve their line's colour, so that a line
    looks the same in every figure of one table.
    """
    looks = _looks(table[lines])
    rows = table
    for column, value in fixed.items():
        rows = rows[rows[column].astype(float) == value]
    points = mean_over_seeds(rows, x, y, lines)
    width = PAGE if len(y) > 1 else COLUMN
    with page(path, columns=len(y), size=(width, 2.4 + 0.16 * legend_rows(looks, width))) as (figure, axes):
        for axis, metric in zip(axes, y, strict=True):
            for name, line in points.dropna(subset=[metric]).groupby(lines, sort=False):
                mean, std = line[metric].to_numpy(float), line[f"{metric}_std"].to_numpy(float)
                bars = {"yerr": std, "capsize": 2.5, "elinewidth": 0.9} if np.isfinite(std).any() else {}
                axis.errorbar(line[x].to_numpy(float), mean, **bars, label=name, **looks[str(name)])
            axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
            _log2_axis(axis, points[x].astype(float))
        figure.suptitle(_title(fixed, points["n"]))
        legend_below(figure)
    return path


def mean_over_seeds(table: pd.DataFrame, x: str, y: Sequence[str], lines: str) -> pd.DataFrame:
    """One row for each (line, x): n (rows averaged), and for each metric its mean and `<metric>_std`.

    The standard deviation is the sample's (n - 1 below the line), NaN for a single row. Lines keep the table's order.
    """
    rows = table.dropna(subset=[lines, x])
    groups = rows.groupby([lines, x], sort=False)
    columns: dict[str, Any] = {"n": groups.size()}
    for metric in y:
        columns |= {metric: groups[metric].mean(), f"{metric}_std": groups[metric].std()}
    order = {name: i for i, name in enumerate(rows[lines].unique())}
    return (
        pd.DataFrame(columns)
        .reset_index()
        .sort_values([lines, x], key=lambda c: c.map(order) if c.name == lines else c)
    )


def frontier(table: pd.DataFrame, path: Path, y: str, colours: str, lines: str) -> Path:
    """The metric `y` against the measured L0: colour by the column `colours`, area by dictionary size (n_latents).

    Rows with equal `lines`, n_latents and k differ by their seed and are averaged into a point; a thin line joins the
    points of different k.
    """
    looks = _looks(table[colours])
    rows = table.dropna(subset=["l0", y, "n_latents"])
    curve = list(dict.fromkeys([colours, lines, "n_latents"]))
    points = rows.groupby([*curve, "k"], sort=False, dropna=False)[["l0", y]].mean().reset_index().sort_values("l0")
    areas = _areas(points["n_latents"])
    with page(path, size=(PAGE * 0.8, max(3.0, 0.9 + 0.17 * (len(looks) + len(areas))))) as (figure, (axes,)):
        for _, its in points.groupby(curve, sort=False):
            own = looks[its[colours].iloc[0]]
            axes.plot(its["l0"], its[y], own["linestyle"], color=own["color"], linewidth=0.7, alpha=0.5)
            look: dict[str, Any] = {"color": own["color"], "marker": own["marker"], "edgecolor": "white"}
            axes.scatter(its["l0"], its[y], areas[its["n_latents"].iloc[0]], linewidth=0.5, zorder=3, **look)
        axes.set(xlabel=LABELS["l0"], ylabel=LABELS.get(y, y))
        axes.margins(0.07)
        _l0_scale(axes, points["l0"])
        entries = [Line2D([], [], label=name, **own) for name, own in looks.items()]
        entries.append(Line2D([], [], linestyle="", label=f"\n{LABELS['n_latents']}"))
        grey: dict[str, Any] = {"marker": "o", "linestyle": "", "color": MUTED}
        entries += [Line2D([], [], **grey, markersize=a**0.5, label=f"{n:,.0f}") for n, a in areas.items()]
        figure.legend(handles=entries, loc="outside right upper")
    return path


def by_job(table: pd.DataFrame, path: Path, y: Sequence[str], label: str) -> Path:
    """The metrics `y` side by side, a point a job, named by the column `label`."""
    height = np.arange(len(table))
    with page(path, columns=len(y), size=(PAGE if len(y) > 1 else COLUMN, 0.8 + 0.2 * len(table))) as (_, axes):
        for axis, metric in zip(axes, y, strict=True):
            axis.plot(table[metric].to_numpy(float), height, "o", color=PALETTE[0])
            axis.set(xlabel=LABELS.get(metric, metric), ylim=(len(table) - 0.5, -0.5))
            axis.set_yticks(height, table[label] if axis is axes[0] else [""] * len(table))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    return path


def l0_by_line(table: pd.DataFrame, path: Path) -> Path:
    """How many latents are active on a token: share of tokens (%) against L0, a panel a line and a colour a k.

    `table` has the columns line, k, l0, bos, other (numbers of tokens); rows of equal line, k and l0 are added up. A
    triangle shows the mean L0 of BOS positions. 99.5 % of the tokens fit on the x axis.
    """
    panels, ks = list(dict.fromkeys(table["line"])), sorted(table["k"].dropna().unique())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    colours = dict(zip(ks, PALETTE, strict=False))
    with page(path, rows, columns, (PAGE if columns > 1 else COLUMN, 0.5 + 1.9 * rows)) as (figure, axes):
        for axis, name in zip(axes, panels, strict=False):
            for k, its in table[table["line"] == name].groupby("k", dropna=False):
                _l0_curve(axis, its, colours.get(k, MUTED), f"k = {k:g}" if k in colours else None)
            axis.set_title(name)
            axis.set_ylim(bottom=0)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[::columns]:
            axis.set_ylabel("Share of tokens (%)")
        figure.supxlabel(f"{LABELS['l0']}; triangles: the mean at BOS positions", size=8)
        legend_below(figure)
    return path


def _l0_curve(axis: Axes, table: pd.DataFrame, colour: str, label: str | None) -> None:
    tokens = table.assign(tokens=table["bos"] + table["other"]).groupby("l0")[["tokens", "bos"]].sum()
    tokens = tokens.reindex(range(int(tokens.index.max()) + 2), fill_value=0)
    share = tokens["tokens"] / tokens["tokens"].sum()
    end = int((share.cumsum() < 0.995).sum()) + 2
    axis.stairs(100 * share[:end], np.arange(min(end, len(share)) + 1) - 0.5, color=colour, label=label)
    if tokens["bos"].any():
        mean = np.average(tokens.index, weights=tokens["bos"])
        axis.plot([mean], [0], "^", color=colour, clip_on=False, zorder=3)


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes for each name, in order of appearance; the dashes change when the colours run out."""
    unique = list(dict.fromkeys(names))
    return {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i // len(PALETTE) % len(DASHES)],
        }
        for i, name in enumerate(unique)
    }


def _title(fixed: Mapping[str, float], n: pd.Series) -> str:
    what = ", ".join(f"{FIXED.get(name, name)} = {value:,.10g}" for name, value in fixed.items())
    if n.max() < 2:
        return what
    seeds = f"{n.max()}" if n.min() == n.max() else f"{n.min()}–{n.max()}"
    return f"{what}{', ' if what else ''}mean ± s.d. over {seeds} seeds"


def _log2_axis(axes: Axes, values: Iterable[float]) -> None:
    """A log2 x axis whose ticks are the values themselves."""
    ticks = sorted(set(values))
    if not ticks or ticks[0] <= 0:
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PLAIN)


def _l0_scale(axes: Axes, l0: pd.Series) -> None:
    """Log2 where L0 spans a factor of 3 or more, as in a sweep over k; a narrow range would be left without a tick."""
    if len(l0) and 0 < 3 * l0.min() <= l0.max():
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PLAIN)


def _areas(sizes: pd.Series) -> dict[float, float]:
    """A marker's area (points²) for each dictionary size, in equal steps."""
    unique = sorted(sizes.unique())
    return dict(zip(unique, np.linspace(16, 70, len(unique)) if len(unique) > 1 else [36.0], strict=True))
