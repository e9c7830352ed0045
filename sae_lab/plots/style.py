"""The style of all figures: fonts, colours, axis labels, page size and legend."""

import re
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colour-blind safe palette, without its yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
INK, MUTED = "#222222", "#777777"
STYLE: dict[str, Any] = {
    # This font ships with matplotlib, so figures are the same on every machine.
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
COLUMN, PAGE = 3.6, 6.8  # width in inches of one column of a paper, and of two
LABELS = {
    "nmse": "Normalized MSE",
    "fvu": "Variance unexplained (share)",
    "ce_degradation": "CE degradation (nats/token)",
    "loss_recovered": "CE loss recovered (share)",
    "l0": "L0 (active latents per token)",
    "batch_size": "Batch size (activations per step)",
    "optimizer.lr": "Learning rate",
    "n_tokens": "Training tokens",
    "k": "k (active latents per token)",
    "n_latents": "Dictionary size (latents)",
}
PLAIN = FuncFormatter(lambda x, _: f"{x:,.10g}")
CHARACTERS_PER_INCH = 15  # of a legend, a title or a label on average
SAMPLE = 0.4  # inches of a legend's line sample and the gap after it


@contextmanager
def page(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (COLUMN, 2.5), facts: str = ""
) -> Iterator[Any]:
    """Create a figure in this style. Yields (figure, list of axes) and writes `path` when the block ends.

    Args:
        size: (width, height) in inches.
        facts: a line above the figure, on what all of it shows: the language model, the site, the tokens.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)
        if facts:
            wrapped = "\n".join(textwrap.wrap(facts.replace("$", r"\$"), int(17 * size[0]), break_long_words=False))
            figure.text(0.5, 1.01, wrapped, ha="center", va="bottom", color=MUTED, size=6.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def legend_below(figure: Figure, min_entries: int = 1) -> None:
    """Draw one legend for all panels below them. Nothing is drawn for fewer than `min_entries` entries."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    if len(entries) < min_entries:
        return
    width = figure.get_figwidth()
    columns = min(len(entries), legend_columns(entries, width))
    columns = -(-len(entries) // -(-len(entries) // columns))  # as few as give the same rows
    layout: dict[str, Any] = {"ncols": columns, "columnspacing": 1.4, "handlelength": 1.8, "handletextpad": 0.5}
    labels = [wrap(label, width - SAMPLE) for label in entries]
    figure.legend(list(entries.values()), labels, loc="outside lower center", **layout)


def legend_columns(labels: Collection[str], width: float) -> int:
    """Return how many columns of entries fit side by side into `width` inches, one at least."""
    return max(1, int(width // (max(map(len, labels)) / CHARACTERS_PER_INCH + SAMPLE)))


def legend_lines(labels: Collection[str], width: float) -> int:
    """Return the number of lines of text of a legend that is `width` inches wide."""
    columns = legend_columns(labels, width)
    return -(-len(labels) // columns) if columns > 1 else sum(1 + wrap(s, width - SAMPLE).count("\n") for s in labels)


def wrap(label: str, width: float) -> str:
    """Break a label that is longer than `width` inches into lines, after commas too."""
    characters = int(CHARACTERS_PER_INCH * width)
    return label if len(label) <= characters else "\n".join(textwrap.wrap(re.sub(r",\s*", ", ", label), characters))


def display_name(name: str) -> str:
    """Return an SAE's name as papers write it: batch_topk → BatchTopK, TopKSAE → TopK."""
    words = {"topk": "TopK", "relu": "ReLU", "jumprelu": "JumpReLU", "sae": "SAE"}
    if name != name.lower():
        return name.removesuffix("SAE") or name
    return "".join(words.get(word, word.capitalize()) for word in name.split("_"))


def has_values(table: pd.DataFrame, column: str) -> bool:
    """Return whether the table has this column and at least one value in it."""
    return column in table and bool(table[column].notna().any())
