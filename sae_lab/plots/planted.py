"""Figure of what an SAE recovers of planted features."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from sae_lab.plots.style import MUTED, PAGE, PALETTE, legend_below, page

FOUND = 0.9
NAMES = {"roots": "roots", "children": "children", "unrelated": "in no tree"}


def recovery_by_frequency(table: pd.DataFrame, path: Path) -> Path:
    """Plot each feature's cosine with its latent against its frequency, and what is found and absorbed by level.

    Args:
        table: one row per feature, columns level, frequency, cosine (0 without a latent), parent (-1: none), absorbed.
    """
    levels = [(str(level), group) for level, group in table.groupby("level", sort=False)]
    with page(path, columns=2, size=(PAGE, 2.8)) as (figure, (left, right)):
        for (level, group), colour in zip(levels, PALETTE, strict=False):
            active = group[group["frequency"] > 0]
            left.scatter(
                active["frequency"], active["cosine"], 7, color=colour, alpha=0.6, linewidths=0, label=name_of(level)
            )
        left.axhline(FOUND, color=MUTED, linestyle=":", linewidth=1)
        left.set(
            xscale="log", ylim=(-0.02, 1.02), xlabel="Frequency (share of rows)", ylabel="|Cosine| with its latent"
        )
        label_frequencies(left)
        draw_shares(right, levels)
        legend_below(figure)
    return path


def label_frequencies(axes: Axes) -> None:
    """Label a logarithmic axis of frequencies in per cent, with steps within a decade where it spans less than two."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda frequency, _: f"{100 * frequency:g}%"))


def draw_shares(axes: Axes, levels: list[tuple[str, pd.DataFrame]]) -> None:
    """Draw bars: the share of each level's features that are found, and the share of its rows that are absorbed."""
    found = [(group["cosine"] > FOUND).mean() for _, group in levels]
    absorbed = [group["absorbed"].mean() if (group["parent"] >= 0).any() else np.nan for _, group in levels]
    place = np.arange(len(levels))
    axes.bar(place - 0.2, found, 0.38, color=MUTED, label=f"found (cosine > {FOUND})")
    axes.bar(place + 0.2, absorbed, 0.38, color="#222222", label="absorbed")
    axes.set_xticks(place, [f"{name_of(level)}\n{len(group):,}" for level, group in levels])
    axes.set(ylim=(0, 1), ylabel="Share of the level")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", visible=False)


def name_of(level: str) -> str:
    """Return a level's name for people."""
    return NAMES.get(level, level.replace("_", " "))
