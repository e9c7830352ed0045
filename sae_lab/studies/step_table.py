"""One table of all jobs of a benchmark sweep."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console, Group
from rich.table import Table

from sae_lab.runtime.files import read_json
from sae_lab.runtime.screen import console, under

COLUMNS = ("SAE", "d", "latents", "k", "floor", "step", "x floor", "eager", "in loop", "tokens/s", "peak GB")
WIDTH = 120
"""Of the table at least, also on a narrower terminal, which would cut numbers short."""


class StepTable(Callback):
    """Prints the table at the end of a sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        files = sorted(Path(config.hydra.sweep.dir).glob("*/benchmark.json"), key=lambda file: file.stat().st_mtime)
        steps = [figures for file in files if "step_ms" in (figures := read_json(file))]
        if steps:
            Console(width=max(WIDTH, console.width)).print(step_table(steps))


def step_table(benchmarks: Iterable[dict[str, Any]]) -> Group:
    """Return a table with one row per benchmark of a step; times in milliseconds."""
    benchmarks = list(benchmarks)
    first = benchmarks[0]
    title = f"training steps, batch {first['config']['batch_size']}, {first['config']['precision']}, {first['device']}"
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "SAE" else "right")
    for figures in benchmarks:
        table.add_row(*step_row(figures))
    return under(title, table)


def step_row(figures: dict[str, Any]) -> list[str]:
    """Return the cells of one benchmark."""
    cfg, floor, step = figures["config"], figures["floor_ms"], figures["step_ms"]
    sizes = [f"{cfg[key]:,}" for key in ("d_in", "n_latents", "k")]
    times = [milliseconds(floor), milliseconds(step), f"{step / floor:.2f}"]
    others = [milliseconds(figures.get("eager_step_ms")), milliseconds(figures["lightning_step_ms"])]
    rest = [f"{figures['tokens_per_second']:,.0f}", f"{figures['peak_memory_mb'] / 2**10:.1f}"]
    return [cfg["sae"]["_target_"].rpartition(".")[2].removesuffix("SAE"), *sizes, *times, *others, *rest]


def milliseconds(time: float | None) -> str:
    """Return a time with three digits after the point; nothing if it was not measured."""
    return "" if time is None else f"{time:,.3f}"
