"""The look of every figure: fonts, colours, the words on its axes, the page it is drawn on."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's palette without its yellow, which vanishes on white: told apart under every kind of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
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


def legend_below(figure: Figure, least: int = 1) -> None:
    """One legend for all panels, under them, where it covers no data; none with fewer than `least` entries."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    keys = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    if len(keys) < least:
        return
    columns = -(-len(keys) // legend_rows(keys, figure.get_figwidth()))
    look: dict[str, Any] = {"ncols": columns, "columnspacing": 1.4, "handlelength": 1.8, "handletextpad": 0.5}
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", **look)


def legend_rows(labels: Collection[str], width: float) -> int:
    """How many rows a legend under a figure takes; an inch holds about 15 characters, a key counts as 6."""
    columns = max(1, int(15 * width // (max(map(len, labels)) + 6)))
    return -(-len(labels) // columns)


def display_name(name: str) -> str:
    """An SAE's name as papers write it: batch_topk → BatchTopK, TopKSAE → TopK."""
    words = {"topk": "TopK", "relu": "ReLU", "jumprelu": "JumpReLU", "sae": "SAE"}
    if name != name.lower():
        return name.removesuffix("SAE") or name
    return "".join(words.get(word, word.capitalize()) for word in name.split("_"))


def has_values(table: pd.DataFrame, column: str) -> bool:
    """Whether a table has the column, with at least one value in it."""
    return column in table and bool(table[column].notna().any())
