"""Progress of training: a bar on a terminal, else a line every few seconds; and the speed for the log.

Not in runtime/screen.py, so that `report` and `export` need not import Lightning, which takes three seconds.
"""

import time
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from sae_lab.activations.buffer import Filling
from sae_lab.parallel.mesh import data_axis
from sae_lab.runtime.screen import WITH_BAR, console, format_duration

BAR_SECONDS = 0.2
"""Between two states of the bar."""


class Throughput(L.Callback):
    """Logs `tokens_per_second`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._tokens, self.rate = time.perf_counter(), 0, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._tokens += len(batch) * data_axis().size
        self.rate = self._tokens / (time.perf_counter() - self._start)
        if (i + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("tokens_per_second", self.rate)


class TrainingProgress(Throughput):
    """Shows steps, loss, l0, dead share, tokens/s and the time left.

    A bar on a terminal, one line that changes in a notebook, else a line every `seconds`.

    Also shows how far a block is filled, which takes a while for a large block.
    """

    def __init__(self, seconds: float = 15.0):
        self.seconds = seconds
        self._bar: Progress | None = None
        self._cell: Any = None
        self._stream: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_shown, self._step, self._steps = time.perf_counter(), trainer.global_step, trainer.max_steps
        self._stream = trainer.datamodule.stream  # type: ignore[attr-defined]
        assert self._stream is not None
        self._stream.filling.watch = self._on_filling
        self._cell = line_of_notebook() if console.is_jupyter else None
        if console.is_terminal:
            bar = [TextColumn("training"), BarColumn()] if console.width >= WITH_BAR else []
            steps = MofNCompleteColumn(table_column=Column(no_wrap=True))
            self._bar = Progress(*bar, steps, TextColumn("{task.fields[state]}"), console=console)
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, state="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, i)
        assert self._stream is not None
        self._step = trainer.global_step
        if not self._is_due():
            return  # the text below reads numbers, for which the host waits for the GPU
        rows = (trainer.max_steps - trainer.global_step) * len(batch) * data_axis().size
        elapsed = time.perf_counter() - self._start
        left = seconds_left(rows, self._tokens, elapsed, self._stream.n_rows_left, self._stream.filling)
        self._show(f"{progress_text(trainer, self.rate)}  {format_duration(left)} left")

    def _on_filling(self, rows: int, of: int) -> None:
        self._show(f"filling the block  {rows:,}/{of:,} activations")

    def _is_due(self) -> bool:
        at_once = self._bar is not None or self._cell is not None
        return time.perf_counter() - self._last_shown > (BAR_SECONDS if at_once else self.seconds)

    def _show(self, state: str) -> None:
        if not self._is_due():
            return
        self._last_shown = time.perf_counter()
        line = f"step {self._step}/{self._steps}  {state}"
        if self._cell is not None:
            self._cell.update(as_text(line), raw=True)
        elif self._bar is None:
            print(line, flush=True)
        else:
            self._bar.update(self._task, completed=self._step, state=state)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step)
        if self._cell is not None:
            self._cell.update(as_text(f"step {self._step}/{self._steps}"), raw=True)
        if self._stream is not None:
            self._stream.filling.watch = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def line_of_notebook() -> Any:
    """Show an empty line in a notebook's cell. Its `update` replaces it."""
    from IPython.display import display  # there in every notebook, and nowhere else

    return display(as_text(""), raw=True, display_id=True)


def as_text(line: str) -> dict[str, str]:
    """Return a line as Jupyter's display takes it."""
    return {"text/plain": line}


def seconds_left(rows: int, trained: int, elapsed: float, n_ready: int, filling: Filling) -> float:
    """Estimate the seconds left for `rows` more rows.

    Filling and training are estimated separately: a block is filled before the steps that train on it, so the first
    step of a block would otherwise look as slow as the whole filling.

    Args:
        trained: rows trained on so far.
        elapsed: seconds that these took, including the filling of blocks.
        n_ready: rows that are left of the current block and need no filling.
        filling: seconds of filling so far, and per row of the last block.
    """
    steps = max(0.0, elapsed - filling.seconds) / trained * rows
    return steps + filling.seconds_per_row * max(0, rows - n_ready)


def progress_text(trainer: L.Trainer, rate: float) -> str:
    """Return the last logged values as one line."""
    logged = trainer.logged_metrics
    shown = {"loss": "{:.4f}", "l0": "{:.1f}", "dead_share": "{:.1%}"}
    parts = [
        f"{name.replace('_share', '')} {form.format(float(logged[name]))}"
        for name, form in shown.items()
        if name in logged
    ]
    return "  ".join([*parts, f"{rate:,.0f} tokens/s"])
