"""Figures of one run: training curves, L0 per token, latent densities and, for two models, relative norms."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from sae_lab.evaluation import diffing
from sae_lab.plots.style import COLUMN, INK, LABELS, MUTED, PAGE, PALETTE, PLAIN, has_values, legend_below, page
from sae_lab.runtime.plain_text import short_count

# Panels of the training curves: label, column of the training values, column of the validation values.
PANELS = (
    ("Reconstruction loss", "loss/reconstruction", ""),
    (LABELS["fvu"], "fvu", "val/fvu"),
    ("L0 (latents per token)", "l0", "val/l0"),
    ("Dead latents (share)", "dead_share", ""),
    (LABELS["loss_recovered"], "", "val/loss_recovered"),
    (LABELS["ce_degradation"], "", "val/ce_degradation"),
    ("KL divergence (nats/token)", "kl", ""),
    ("Learning rate", "lr", ""),
    ("Tokens per second, mean so far", "tokens_per_second", ""),
)
NOT_DRAWN = {"val/nmse", "val/dead_fraction"}


def training_curves(table: pd.DataFrame, path: Path, facts: str = "") -> Path:
    """Plot what was logged against tokens, one panel each: training values as lines, validation values as dots.

    Args:
        table: metrics.csv of a run. Panels without data are left out; without any data one empty panel is drawn. Other
            values that validation logs, those of one's own metrics, have panels at the end.
    """
    known = NOT_DRAWN.union(*(panel[1:] for panel in PANELS))
    own = [(c.removeprefix("val/"), "", c) for c in sorted(table.columns) if c.startswith("val/") and c not in known]
    found = [p for p in (*PANELS, *own) if has_values(table, p[1]) or has_values(table, p[2])]
    panels = found if has_values(table, "tokens") else []
    tokens = _tokens(table) if panels else np.empty(0)
    columns = max(1, min(len(panels), 2 if len(panels) < 5 else 3))
    rows = max(1, -(-len(panels) // columns))
    size = (COLUMN if columns == 1 else PAGE, 0.6 + 1.6 * rows)
    with page(path, rows, columns, size, facts) as (figure, axes):
        for axis, (label, training, validation) in zip(axes, panels, strict=False):
            _curve(axis, tokens, table, training, color=PALETTE[0], linewidth=1, label="training")
            _curve(axis, tokens, table, validation, **VALIDATION)
            axis.set_title(label)
            if label != LABELS["loss_recovered"]:  # which is near 1
                _loss_scale(axis, may_be_log=training != "lr")
            if training in ("lr", "tokens_per_second"):  # not as 1e6, beside the panel
                axis.yaxis.set_major_formatter(PLAIN)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
            axis.set_xlim(0, 1.02 * tokens.max())
        for axis in axes[max(1, len(panels)) :]:
            axis.set_visible(False)
        for axis in axes[: len(panels) or 1][-columns:]:
            axis.set_xlabel("Training tokens")
        if not panels:
            axes[0].set_title("nothing was logged")
        legend_below(figure, min_entries=2)
    return path


VALIDATION: dict[str, Any] = {
    "color": PALETTE[1],
    "marker": "o",
    "markersize": 3,
    "linewidth": 0.8,
    "label": "validation, before calibration",
}


def activations(table: pd.DataFrame, path: Path, facts: str = "") -> Path:
    """Plot a histogram of the size of active entries, |z|, in % of all of them. Four bins are one octave.

    The x axis leaves out the smallest 0.1 % of them.

    Args:
        table: columns log2 (centre of the bin of log2 |z|), entries.
    """
    entries = table["entries"].to_numpy(float)
    with page(path, facts=facts) as (figure, (axes,)):
        if entries.sum():
            left, right = (2.0 ** (table["log2"].to_numpy(float) + shift) for shift in (-1 / 8, 1 / 8))
            share = 100 * entries / entries.sum()
            axes.bar(left, share, right - left, align="edge", color=PALETTE[0], edgecolor="white", linewidth=0.4)
            middle = float(
                2 ** np.interp(0.5, np.cumsum(entries) / entries.sum(), table["log2"].to_numpy(float) + 1 / 8)
            )
            axes.axvline(middle, color=INK, linestyle="--", linewidth=1, label=f"median = {middle:.2g}")
            axes.set_xscale("log", base=2)
            axes.set_xlim(left=left[np.argmax(np.cumsum(share) > 0.1)])
            axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
            legend_below(figure)
        else:
            axes.set_title("no latent is active")
        axes.set(xlabel="Activation |z| of an active latent", ylabel="Share of active entries (%)")
        axes.grid(axis="x", visible=False)
    return path


def l0_per_token(table: pd.DataFrame, path: Path, k: float | None = None, facts: str = "") -> Path:
    """Plot a histogram of L0 (active latents per token) in % of the tokens, with BOS tokens in a colour of their own.

    Args:
        table: columns l0, bos, other (numbers of tokens). The x axis covers 99.9 % of the tokens.
        k: drawn as a vertical line.
    """
    l0, bos, other = (table[c].to_numpy(float) for c in ("l0", "bos", "other"))
    total = (bos + other).sum()
    mean = (l0 * (bos + other)).sum() / total
    edges = _l0_bins(l0, bos + other)
    with page(path, facts=facts) as (figure, (axes,)):
        base = np.zeros(len(edges) - 1)
        for name, count, colour in (("BOS", bos, PALETTE[1]), ("other tokens", other, PALETTE[0])):
            if not count.any():
                continue
            share = 100 * np.histogram(l0, edges, weights=count)[0] / total
            axes.bar(edges[:-1], share, np.diff(edges), bottom=base, align="edge", color=colour, label=name)
            base += share
        axes.axvline(mean, color=INK, linestyle="--", linewidth=1, label=f"mean = {mean:.1f}")
        if k is not None:
            axes.axvline(k, color=MUTED, linestyle=":", linewidth=1.2, label=f"k = {k:g}")
        axes.set(xlabel=LABELS["l0"], ylabel="Share of tokens (%)", xlim=(edges[0], edges[-1]))
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(PLAIN)
        beyond = l0[(l0 >= edges[-1]) & (bos + other > 0)]
        if beyond.size:
            axes.set_title(f"not shown: the last 0.1 % of tokens, up to L0 = {beyond.max():,.0f}", color=MUTED, size=7)
        legend_below(figure)
    return path


def latent_density(table: pd.DataFrame, path: Path, facts: str = "") -> Path:
    """Plot a histogram of log10 of each latent's density (share of tokens on which it fires).

    Args:
        table: column density, one row per latent. Dead latents are not drawn, but counted in the title.
    """
    density = table["density"].to_numpy(float)
    alive = np.log10(density[density > 0])
    dead = density.size - alive.size
    with page(path, facts=facts) as (figure, (axes,)):
        if alive.size:
            # Bins are quarters of a decade with fixed edges, so that figures of different SAEs can be compared.
            edges = np.arange(np.floor(alive.min() * 4), np.floor(alive.max() * 4) + 2) / 4
            axes.hist(alive, edges, color=PALETTE[0], edgecolor="white", linewidth=0.4)
            median = float(np.median(alive))
            axes.axvline(median, color=INK, linestyle="--", linewidth=1, label=f"median = {_power(10**median)}")
            axes.set_xlim(np.floor(edges[0]), np.ceil(edges[-1]) if edges[-1] <= 0 else edges[-1])
            legend_below(figure)
        axes.set_title(f"{dead:,} of {density.size:,} latents are dead ({100 * dead / density.size:.1f} %)")
        axes.set(xlabel="Density (share of tokens on which a latent fires)", ylabel="Number of latents")
        if not alive.size:
            axes.set(xlim=(-6, 0), ylim=(0, 1))
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$10^{{{x:g}}}$"))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_formatter(PLAIN)
    return path


def relative_norm(table: pd.DataFrame, path: Path, facts: str = "") -> Path:
    """Plot a histogram of |W_dec_B| / (|W_dec_A| + |W_dec_B|), with a colour for each class of `diffing`.

    Args:
        table: from `diffing.latent_table`. Latents that never fire are not drawn, but counted in the title.
    """
    alive = table[table["density"] > 0]
    edges = np.linspace(0, 1, 51)  # contains the bounds of the classes
    colours = {**dict(zip(diffing.CLASSES, PALETTE[:3], strict=True)), diffing.BETWEEN: "#BBBBBB"}
    names = {"base_only": "base only", "shared": "shared", "tuned_only": "fine-tuned only", "between": "between"}
    with page(path, facts=facts) as (figure, (axes,)):
        for name, colour in colours.items():
            ratio = alive["relative_norm"][alive["class"] == name]
            axes.hist(
                ratio, edges, color=colour, edgecolor="white", linewidth=0.4, label=f"{names[name]}: {len(ratio):,}"
            )
        for bound in sorted({bound for bounds in diffing.CLASSES.values() for bound in bounds} - {0.0, 1.0}):
            axes.axvline(bound, color=MUTED, linestyle=":", linewidth=0.8)
        axes.set(
            xlabel="Decoder norm in the fine-tuned model (share of both models')",
            ylabel="Number of latents (log scale above 10)",
            xlim=(0, 1),
        )
        axes.set_yscale("symlog", linthresh=10, subs=(2, 5))
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=10, subs=(1, 2, 5)))
        dead = len(table) - len(alive)
        axes.set_title(f"{dead:,} of {len(table):,} latents never fire and are left out")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.grid(axis="x", visible=False)
        legend_below(figure)
    return path


def _l0_bins(l0: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the edges of about 80 bins at most, centered on whole numbers, up to the 99.9 % quantile of L0."""
    order = np.argsort(l0)
    cumulative = np.cumsum(tokens[order]) / tokens.sum()
    top = l0[order][np.searchsorted(cumulative, 0.999)]
    low = l0[tokens > 0].min()
    margin = max(5.0, 0.1 * (top - low))
    low = 0 if low <= max(top / 2, margin) else np.floor(low - margin)
    width = np.ceil((top + margin - low) / 80)
    return np.arange(low - 0.5, top + margin + width, width)


def _tokens(table: pd.DataFrame) -> np.ndarray:
    """Return the tokens seen at each row. A validation row may hold only the step: its tokens are interpolated."""
    known = table.dropna(subset=["tokens"]).sort_values("step")
    missing = np.interp(table["step"], known["step"], known["tokens"])
    return table["tokens"].fillna(pd.Series(missing, table.index)).to_numpy(float)


def _curve(axes: Axes, tokens: np.ndarray, table: pd.DataFrame, column: str, **look: Any) -> None:
    if has_values(table, column):
        curve = pd.DataFrame({"x": tokens, "y": table[column].to_numpy(float)}).dropna().sort_values("x", kind="stable")
        few = {"marker": "."} if len(curve) < 20 else {}  # a line through one point is invisible
        # above the axes' lines: a share of 0 is to be seen
        axes.plot(curve["x"], curve["y"], zorder=3, clip_on=False, **(few | look))


def _loss_scale(axes: Axes, may_be_log: bool = True) -> None:
    """Use a log y axis if the curves span a decade or more, else a linear one from 0."""
    y = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    if may_be_log and 0 < 10 * y.min() <= y.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PLAIN)
    elif y.min() >= 0:
        axes.set_ylim(0, 1.06 * y.max() or 1)


def _power(x: float) -> str:
    """Format x like the axis: 0.0031 → 3.1·10⁻³."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"${mantissa}\\cdot10^{{{int(exponent)}}}$"
