"""The figure of a comparison of dictionaries: how close the matched latents of each pair of SAEs are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sae_lab.plots.style import COLUMN, MUTED, PALETTE, legend_below, page


def matched_cosines(
    cosines: Mapping[str, np.ndarray], path: Path, thresholds: Sequence[float] = (), facts: str = ""
) -> Path:
    """Plot the distribution of the cosines of matched latents, one line per pair of SAEs.

    Args:
        cosines: by the name of the pair.
        thresholds: drawn as vertical lines.
        facts: a line above the figure.
    """
    low = min([0.0, *(float(values.min()) for values in cosines.values() if len(values))])
    edges = np.linspace(low, 1.0, 41)
    with page(path, size=(COLUMN, 2.7), facts=facts) as (figure, (axes,)):
        for i, (name, values) in enumerate(cosines.items()):
            share = 100 * np.histogram(np.clip(values, low, 1.0), edges)[0] / max(1, len(values))
            axes.stairs(share, edges, color=PALETTE[i % len(PALETTE)], label=name, linewidth=1.2)
        for threshold in thresholds:
            axes.axvline(threshold, color=MUTED, linestyle=":", linewidth=1)
        axes.set(xlabel="Cosine of matched decoder rows", ylabel="Share of matched latents (%)", xlim=(low, 1.0))
        legend_below(figure)
    return path
