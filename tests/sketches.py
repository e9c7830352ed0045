"""Figures as sketches: drawn once, with few dots and no search for a layout, which takes a third of a small run.

All figures of the tests are sketches, but for those of processes that the shell starts and of test_plots.py.
"""

from typing import Any

from matplotlib.figure import Figure

from sae_lab.plots import style

AS_SKETCHES = {"savefig.dpi": 20, "savefig.bbox": None}
AS_DRAWN = {key: style.STYLE[key] for key in AS_SKETCHES}


class Sketch(Figure):
    def __init__(self, *args: Any, layout: str, **options: Any):
        assert layout == "constrained"
        super().__init__(*args, **options)


def draw_sketches(sketches: bool = True) -> None:
    style.Figure = Sketch if sketches else Figure
    style.STYLE.update(AS_SKETCHES if sketches else AS_DRAWN)
