"""What training shows: a progress bar on a terminal, else a line now and then; and the speed, for the log.

Apart from screen.py, so that `report` and `export`, which train nothing, start without Lightning's three seconds.
"""

import time
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sae_lab.screen import console


class Throughput(L.Callback):
    """Logs tokens_per_second."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._tokens, self.rate = time.perf_counter(), 0, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._tokens += len(batch)
        self.rate = self._tokens / (time.perf_counter() - self._start)
        if (i + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("tokens_per_second", self.rate)


class TrainingProgress(Throughput):
    """Steps, loss, l0, dead share, tokens/s and ETA: a live bar on a terminal, a line every `seconds` elsewhere."""

    def __init__(self, seconds: float = 15.0):
        self.seconds = seconds
        self._bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._said = time.perf_counter()
        if console.is_terminal:
            columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, state="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, i)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, state=state(trainer, self.rate))
        elif time.perf_counter() - self._said > self.seconds:
            self._said = time.perf_counter()
            left = (trainer.max_steps - trainer.global_step) * len(batch) / self.rate
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            print(f"{step}  {state(trainer, self.rate)}  {left:.0f} s left", flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def state(trainer: L.Trainer, rate: float) -> str:
    """The last logged figures, in a line."""
    logged = trainer.logged_metrics
    shown = {"loss": "{:.4f}", "l0": "{:.1f}", "dead_share": "{:.1%}"}
    parts = [
        f"{name.replace('_share', '')} {form.format(float(logged[name]))}"
        for name, form in shown.items()
        if name in logged
    ]
    return "  ".join([*parts, f"{rate:,.0f} tokens/s"])
