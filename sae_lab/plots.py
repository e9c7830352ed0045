"""Figures, from tables: each function takes a table and a path, draws, writes a PNG there and returns the path."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sae_lab import diffing

# Okabe and Ito's palette without its yellow, which vanishes on white: told apart under every kind of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = "os^DvPX"
DASHES = ("-", "--", ":", "-.")
INK, MUTED = "#222222", "#777777"

STYLE: dict[str, Any] = {
    # matplotlib ships this font, so a figure is the same on every machine.
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
}
COLUMN, PAGE = 3.6, 6.8  # inches: one column of a paper, and both

LABELS = {
    "nmse": "Normalised MSE",
    "fvu": "Variance unexplained (share)",
    "ce_degradation": "CE degradation (nats/token)",
    "loss_recovered": "CE loss recovered (share)",
    "l0": "L0 (active latents per token)",
    "k": "k (active latents per token)",
    "n_latents": "Dictionary size (latents)",
}
# The panels of a training log: label, its column in training and in validation.
PANELS = (
    ("Reconstruction loss", "loss/reconstruction", ""),
    (LABELS["fvu"], "fvu", "val/fvu"),
    ("L0 (latents per token)", "l0", "val/l0"),
    ("Dead latents (share)", "dead_share", ""),
)
FIXED = {"n_latents": "dictionary size"}
PLAIN = FuncFormatter(lambda x, _: f"{x:,.10g}")


@contextmanager
def page(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (COLUMN, 2.5)) -> Iterator[Any]:
    """A figure in the house style, size in inches: yields (figure, list of axes), writes `path` when the block ends."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def l0_per_token(table: pd.DataFrame, path: Path, k: float | None = None) -> Path:
    """How many latents are active on a token: share of tokens (%) against L0, BOS positions told apart.

    `table` has the columns l0, bos, other (numbers of tokens). 99.9 % of the tokens fit on the x axis.
    """
    l0, bos, other = (table[c].to_numpy(float) for c in ("l0", "bos", "other"))
    total = (bos + other).sum()
    mean = (l0 * (bos + other)).sum() / total
    edges = _l0_bins(l0, bos + other)
    with page(path) as (figure, (axes,)):
        base = np.zeros(len(edges) - 1)
        for name, count, colour in (("BOS", bos, PALETTE[1]), ("other tokens", other, PALETTE[0])):
            share = 100 * np.histogram(l0, edges, weights=count)[0] / total
            axes.bar(edges[:-1], share, np.diff(edges), bottom=base, align="edge", color=colour, label=name)
            base += share
        axes.axvline(mean, color=INK, linestyle="--", linewidth=1, label=f"mean = {mean:.1f}")
        if k is not None:
            axes.axvline(k, color=MUTED, linestyle=":", linewidth=1.2, label=f"k = {k:g}")
        axes.set(xlabel=LABELS["l0"], ylabel="Share of tokens (%)", xlim=(edges[0], edges[-1]))
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        beyond = l0[(l0 >= edges[-1]) & (bos + other > 0)]
        if beyond.size:
            axes.set_title(f"not shown: the last 0.1 % of tokens, up to L0 = {beyond.max():,.0f}", color=MUTED, size=7)
        _legend_below(figure)
    return path


def latent_density(table: pd.DataFrame, path: Path) -> Path:
    """On what share of tokens each latent fires: a histogram over log10 of the share; dead latents are counted apart.

    `table` has the column density, one row a latent.
    """
    density = table["density"].to_numpy(float)
    alive = np.log10(density[density > 0])
    dead = density.size - alive.size
    with page(path) as (figure, (axes,)):
        if alive.size:
            # Quarters of a decade, on whole quarters: two SAEs' figures have the same bins.
            edges = np.arange(np.floor(alive.min() * 4), np.floor(alive.max() * 4) + 2) / 4
            axes.hist(alive, edges, color=PALETTE[0], edgecolor="white", linewidth=0.4)
            median = float(np.median(alive))
            axes.axvline(median, color=INK, linestyle="--", linewidth=1, label=f"median = {_power(10**median)}")
            _legend_below(figure)
        axes.set_title(f"{dead:,} of {density.size:,} latents are dead ({dead / density.size:.1%})")
        axes.set(xlabel="Density (share of tokens on which a latent fires)", ylabel="Number of latents")
        if not alive.size:
            axes.set(xlim=(-6, 0), ylim=(0, 1))
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$10^{{{x:g}}}$"))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_formatter(PLAIN)
    return path


def relative_norm(table: pd.DataFrame, path: Path) -> Path:
    """Whose feature each latent is: a histogram over |W_dec_B| / (|W_dec_A| + |W_dec_B|), a colour for each class.

    `table` is that of `diffing.latents`. Latents that never fire are counted in the title and not drawn.
    """
    alive = table[table["density"] > 0]
    edges = np.linspace(0, 1, 51)  # the bounds of the classes are edges
    colours = {**dict(zip(diffing.CLASSES, PALETTE[:3], strict=True)), diffing.BETWEEN: "#BBBBBB"}
    names = {"base_only": "base only", "shared": "shared", "tuned_only": "fine-tuned only", "between": "between"}
    with page(path) as (figure, (axes,)):
        for name, colour in colours.items():
            ratio = alive["relative_norm"][alive["class"] == name]
            axes.hist(
                ratio, edges, color=colour, edgecolor="white", linewidth=0.4, label=f"{names[name]}: {len(ratio):,}"
            )
        for bound in sorted({bound for bounds in diffing.CLASSES.values() for bound in bounds} - {0.0, 1.0}):
            axes.axvline(bound, color=MUTED, linestyle=":", linewidth=0.8)
        axes.set(
            xlabel="Decoder norm in the fine-tuned model (share of both models')",
            ylabel="Number of latents",
            xlim=(0, 1),
        )
        axes.set_yscale("symlog", linthresh=10)
        dead = len(table) - len(alive)
        axes.set_title(f"{dead:,} of {len(table):,} latents never fire and are left out")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.grid(axis="x", visible=False)
        _legend_below(figure)
    return path


def training_curves(table: pd.DataFrame, path: Path) -> Path:
    """Reconstruction loss, FVU, L0 and the share of dead latents against tokens, one panel each; validation as dots.

    `table` is a run's metrics.csv; a panel without data is left out, and a log without any leaves one empty panel.
    """
    panels = [p for p in PANELS if has_values(table, "tokens") and (has_values(table, p[1]) or has_values(table, p[2]))]
    tokens = _tokens(table) if panels else np.empty(0)
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // 2))
    dots = {"color": PALETTE[1], "marker": "o", "markersize": 3, "linewidth": 0.8, "label": "validation"}
    with page(path, rows, columns, (COLUMN if columns == 1 else PAGE, 0.6 + 1.8 * rows)) as (figure, axes):
        for axis, (label, training, validation) in zip(axes, panels, strict=False):
            _curve(axis, tokens, table, training, color=PALETTE[0], linewidth=1, label="training")
            _curve(axis, tokens, table, validation, **dots)
            axis.set_ylabel(label)
            _loss_scale(axis)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axis in axes[max(1, len(panels)) :]:
            axis.set_visible(False)
        for axis in axes[: len(panels) or 1][-columns:]:
            axis.set_xlabel("Training tokens")
        if not panels:
            axes[0].set_title("nothing was logged")
        _legend_below(figure, least=2)
    return path


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
    with page(path, columns=len(y), size=(width, 2.4 + 0.16 * _legend_rows(looks, width))) as (figure, axes):
        for axis, metric in zip(axes, y, strict=True):
            for name, line in points.dropna(subset=[metric]).groupby(lines, sort=False):
                mean, std = line[metric].to_numpy(float), line[f"{metric}_std"].to_numpy(float)
                bars = {"yerr": std, "capsize": 2.5, "elinewidth": 0.9} if np.isfinite(std).any() else {}
                axis.errorbar(line[x].to_numpy(float), mean, **bars, label=name, **looks[str(name)])
            axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
            _log2_axis(axis, points[x].astype(float))
        figure.suptitle(_title(fixed, points["n"]))
        _legend_below(figure)
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


def spelled(name: str) -> str:
    """An SAE's name as papers write it: batch_topk → BatchTopK, TopKSAE → TopK."""
    words = {"topk": "TopK", "relu": "ReLU", "jumprelu": "JumpReLU", "sae": "SAE"}
    if name != name.lower():
        return name.removesuffix("SAE") or name
    return "".join(words.get(word, word.capitalize()) for word in name.split("_"))


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


def _legend_below(figure: Figure, least: int = 1) -> None:
    """One legend for all panels, under them, where it covers no data; none with fewer than `least` entries."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    keys = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    if len(keys) < least:
        return
    columns = -(-len(keys) // _legend_rows(keys, figure.get_figwidth()))
    look: dict[str, Any] = {"ncols": columns, "columnspacing": 1.4, "handlelength": 1.8, "handletextpad": 0.5}
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", **look)


def _legend_rows(labels: Collection[str], width: float) -> int:
    """How many rows a legend under a figure takes; an inch holds about 15 characters, a key counts as 6."""
    columns = max(1, int(15 * width // (max(map(len, labels)) + 6)))
    return -(-len(labels) // columns)


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


def _l0_bins(l0: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Edges of at most about 80 bins around whole numbers, up to the L0 that 99.9 % of the tokens do not exceed."""
    order = np.argsort(l0)
    below = np.cumsum(tokens[order]) / tokens.sum()
    top = l0[order][np.searchsorted(below, 0.999)]
    low = l0[tokens > 0].min()
    margin = max(5.0, 0.1 * (top - low))
    low = 0 if low <= max(top / 2, margin) else np.floor(low - margin)
    width = np.ceil((top + margin - low) / 80)
    return np.arange(low - 0.5, top + margin + width, width)


def _tokens(table: pd.DataFrame) -> np.ndarray:
    """Tokens seen at each row; a validation row may hold the step alone, and takes its tokens from its neighbours."""
    known = table.dropna(subset=["tokens"]).sort_values("step")
    missing = np.interp(table["step"], known["step"], known["tokens"])
    return table["tokens"].fillna(pd.Series(missing, table.index)).to_numpy(float)


def _curve(axes: Axes, tokens: np.ndarray, table: pd.DataFrame, column: str, **look: Any) -> None:
    if has_values(table, column):
        curve = pd.DataFrame({"x": tokens, "y": table[column].to_numpy(float)}).dropna().sort_values("x", kind="stable")
        few = {"marker": "."} if len(curve) < 20 else {}  # a line through one point is invisible
        axes.plot(curve["x"], curve["y"], **(few | look))


def _loss_scale(axes: Axes) -> None:
    """A log y axis where the curves span a decade or more, else a linear one from 0."""
    y = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    if 0 < 10 * y.min() <= y.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PLAIN)
    elif y.min() >= 0:
        axes.set_ylim(0, 1.06 * y.max() or 1)


def _areas(sizes: pd.Series) -> dict[float, float]:
    """A marker's area (points²) for each dictionary size, in equal steps."""
    unique = sorted(sizes.unique())
    return dict(zip(unique, np.linspace(16, 70, len(unique)) if len(unique) > 1 else [36.0], strict=True))


def _power(x: float) -> str:
    """x in the notation of the axis: 0.0031 → 3.1·10⁻³."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"${mantissa}\\cdot10^{{{int(exponent)}}}$"


def has_values(table: pd.DataFrame, column: str) -> bool:
    """Whether a table has the column, with at least one value in it."""
    return column in table and bool(table[column].notna().any())
