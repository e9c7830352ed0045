"""Figures of a sweep: metrics against the swept option, with one line per architecture and error bars over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from sae_lab.plots.style import (
    CHARACTERS_PER_INCH,
    COLUMN,
    LABELS,
    MUTED,
    PAGE,
    PALETTE,
    PLAIN,
    has_values,
    legend_below,
    legend_lines,
    page,
    wrap,
)

MARKERS = "os^DvPX"
DASHES = ("-", "--", ":", "-.")
FIXED = {"n_latents": "dictionary size"}


def metrics_against(
    table: pd.DataFrame, path: Path, x: str, y: Sequence[str], lines: str, fixed: Mapping[str, float], facts: str = ""
) -> Path:
    """Plot metrics against a column: mean ± standard deviation over seeds.

    Args:
        x: column of the x axis.
        y: metrics, one panel each; one without values for these rows has none.
        lines: column whose values become lines. A value has the same colour in every figure of one table.
        fixed: rows to draw, such as {"k": 16}.
    """
    styles = _line_styles(table[lines])
    rows = table
    for column, value in fixed.items():
        rows = rows[rows[column].astype(float) == value]
    points = mean_over_seeds(rows, x, y, lines)
    y = [metric for metric in y if has_values(points, metric)] or y
    covers = covered_lines(points, x, y, lines)
    labels = {name: name + covers.get(name, "") for name in styles}
    width = PAGE if len(y) > 1 else COLUMN
    size = (width, 2.4 + 0.16 * legend_lines([*labels.values()], width))
    with page(path, columns=len(y), size=size, facts=facts) as (figure, axes):
        for axis, metric in zip(axes, y, strict=True):
            for name, line in points.dropna(subset=[metric]).groupby(lines, sort=False):
                mean, std = line[metric].to_numpy(float), line[f"{metric}_std"].to_numpy(float)
                bars = {"yerr": std, "capsize": 2.5, "elinewidth": 0.9} if np.isfinite(std).any() else {}
                look = styles[str(name)] | {"label": labels[str(name)]}
                axis.errorbar(line[x].to_numpy(float), mean, **bars, **look)
            axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
            _log2_axis(axis, points[x].astype(float))
        figure.suptitle(_title(fixed, points["n"]))
        legend_below(figure)
    return path


def mean_over_seeds(table: pd.DataFrame, x: str, y: Sequence[str], lines: str) -> pd.DataFrame:
    """Average over seeds. Returns one row per (line, x): n (rows averaged), and each metric with its `<metric>_std`.

    The standard deviation is the sample's (divided by n - 1), NaN for a single row. Lines keep the table's order.
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


def covered_lines(points: pd.DataFrame, x: str, y: Sequence[str], lines: str) -> dict[str, str]:
    """Return, for the name of each line that covers an earlier one, what the legend says of it.

    A line covers another if all its points are within 1 % of the height of their panel.

    Args:
        points: from `mean_over_seeds`.
    """
    heights = points[[*y]].max() - points[[*y]].min()
    of = {str(name): line.set_index(x)[[*y]] for name, line in points.groupby(lines, sort=False)}
    said: dict[str, str] = {}
    for name, line in of.items():
        for other in of:
            if other == name:
                break
            if line.index.equals(of[other].index) and ((line - of[other]).abs() <= 0.01 * heights).all(axis=None):
                said[name] = f" (on top of {other})"
    return said


def frontier(table: pd.DataFrame, path: Path, y: str, colours: str, lines: str, facts: str = "") -> Path:
    """Plot a metric against the measured L0. The area of a marker shows the dictionary size (n_latents).

    Rows with equal `lines`, n_latents and k differ in their seed only and are averaged into one point. A thin line
    joins the points of different k.

    Args:
        y: the metric.
        colours: column that decides the colour.
        lines: column that tells lines apart.
    """
    styles = _line_styles(table[colours])
    rows = table.dropna(subset=["l0", y, "n_latents"])
    curve = list(dict.fromkeys([colours, lines, "n_latents"]))
    by = [*curve, "k"]
    points = rows.groupby(by, sort=False, dropna=False)[["l0", y]].mean().reset_index().sort_values("l0")
    areas = _areas(points["n_latents"])
    size = (PAGE * 0.8, max(3.0, 0.9 + 0.17 * (len(styles) + len(areas))))
    with page(path, size=size, facts=facts) as (figure, (axes,)):
        for _, group in points.groupby(curve, sort=False):
            style = styles[group[colours].iloc[0]]
            axes.plot(group["l0"], group[y], style["linestyle"], color=style["color"], linewidth=0.7, alpha=0.5)
            marker: dict[str, Any] = {"color": style["color"], "marker": style["marker"], "edgecolor": "white"}
            axes.scatter(group["l0"], group[y], areas[group["n_latents"].iloc[0]], linewidth=0.5, zorder=3, **marker)
        axes.set(xlabel=LABELS["l0"], ylabel=LABELS.get(y, y), title=over_seeds(rows.groupby(by, dropna=False).size()))
        axes.margins(0.07)
        _l0_scale(axes, points["l0"])
        entries = [Line2D([], [], label=name, **style) for name, style in styles.items()]
        entries.append(Line2D([], [], linestyle="", label=f"\n{LABELS['n_latents']}"))
        grey: dict[str, Any] = {"marker": "o", "linestyle": "", "color": MUTED}
        entries += [Line2D([], [], **grey, markersize=a**0.5, label=f"{n:,.0f}") for n, a in areas.items()]
        figure.legend(handles=entries, loc="outside right upper")
    return path


def by_job(table: pd.DataFrame, path: Path, y: Sequence[str], label: str, facts: str = "") -> Path:
    """Plot the metrics `y` side by side, with one point per job, named by the column `label`."""
    width = PAGE if len(y) > 1 else COLUMN
    names = [wrap(str(name), width / 3) for name in table[label]]
    ends = np.cumsum([1 + 0.6 * name.count("\n") for name in names])
    height = (ends + np.concatenate([[0.0], ends[:-1]])) / 2
    size = (width, 0.8 + 0.2 * ends[-1])
    with page(path, columns=len(y), size=size, facts=facts) as (_, axes):
        for axis, metric in zip(axes, y, strict=True):
            axis.plot(table[metric].to_numpy(float), height, "o", color=PALETTE[0])
            axis.set(xlabel=LABELS.get(metric, metric), ylim=(ends[-1], 0))
            axis.set_yticks(height, names if axis is axes[0] else [""] * len(names))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    return path


def l0_by_line(table: pd.DataFrame, path: Path, facts: str = "") -> Path:
    """Plot histograms of L0 (active latents per token) in % of the tokens: one panel per line, one colour per k.

    Args:
        table: columns line, k, l0, bos, other (numbers of tokens). Rows with equal line, k and l0 are added up. The x
            axis covers 99.5 % of the tokens.
    """
    panels, ks = list(dict.fromkeys(table["line"])), sorted(table["k"].dropna().unique())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    colours = dict(zip(ks, PALETTE, strict=False))
    width = PAGE if columns > 1 else COLUMN
    titles = {name: wrap(str(name), 0.95 * width / columns) for name in panels}
    tallest = 0.15 * max(title.count("\n") for title in titles.values())
    with page(path, rows, columns, (width, 0.5 + (1.9 + tallest) * rows), facts) as (figure, axes):
        for axis, name in zip(axes, panels, strict=False):
            for k, group in table[table["line"] == name].groupby("k", dropna=False):
                _l0_curve(axis, group, colours.get(k, MUTED), f"k = {k:g}" if k in colours else None)
            axis.set(title=titles[name], xlabel=LABELS["l0"], ylim=(0, None))
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[::columns]:
            axis.set_ylabel("Share of tokens (%)")
        if table["bos"].any():
            axes[0].plot([], [], "^", color=MUTED, label="mean at BOS positions")
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


def _line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and dashes of each name, in order of appearance. Dashes change after the last colour."""
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
    settings = ", ".join(f"{FIXED.get(name, name)} = {value:,.10g}" for name, value in fixed.items())
    return ", ".join(filter(None, [settings, over_seeds(n, "mean ± s.d.")]))


def over_seeds(n: pd.Series, what: str = "mean") -> str:
    """Say over how many seeds points are averaged, given the numbers of rows of each; nothing where all have one."""
    if not n.max() > 1:
        return ""
    return f"{what} over {n.max()} seeds" if n.min() == n.max() else f"{what} over {n.min()}–{n.max()} seeds"


def _log2_axis(axes: Axes, values: Iterable[float]) -> None:
    """Use a log2 x axis with ticks at the values, but for those whose labels would overlap."""
    places = sorted(set(values))
    if not places or places[0] <= 0:
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(spaced(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PLAIN)


def spaced(places: Sequence[float]) -> list[float]:
    """Return the places, in order, that leave room for their labels on a log axis of 2.5 inches."""
    kept = [places[0]]
    inches = 2.5 / max(np.log2(places[-1] / places[0]), 1e-9)
    for place in places[1:]:
        characters = (len(PLAIN(place)) + len(PLAIN(kept[-1]))) / 2
        if np.log2(place / kept[-1]) * inches > (characters + 1) / CHARACTERS_PER_INCH:
            kept.append(place)
    return kept


def _l0_scale(axes: Axes, l0: pd.Series) -> None:
    """Use a log2 x axis if L0 spans a factor of 3 or more. A narrower range could end up without a tick."""
    if len(l0) and 0 < 3 * l0.min() <= l0.max():
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PLAIN)


def _areas(sizes: pd.Series) -> dict[float, float]:
    """Return a marker area (points²) for each dictionary size, in equal steps."""
    unique = sorted(sizes.unique())
    return dict(zip(unique, np.linspace(16, 70, len(unique)) if len(unique) > 1 else [36.0], strict=True))
