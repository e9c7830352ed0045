"""SIGINT and SIGTERM while training: finish the step, save a checkpoint, leave."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from sae_lab.runtime.errors import Interrupted


class Signals:
    """Notes the first SIGINT or SIGTERM as `received`, to be acted on once it is `due`; a later one ends the process.

    A repeat within ECHO seconds is the same wish: `timeout make demo` sends it to make, which passes it on, and to us.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO = 2.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self.due: int | None = None
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on; again where other code has put its handlers in between."""
        before: dict[int, Any] = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        self._handlers = self._handlers or before

    def restore(self) -> None:
        """As it was before the first `listen`."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signum, time.monotonic()
        elif time.monotonic() - self._time > self.ECHO:
            raise Interrupted("Stopped at once by a second signal; what was saved before stands", signum)


class SaveWhenDue(L.Callback):
    """Saves a checkpoint after the step in which a signal is due."""

    def __init__(self, checkpoint: Path, signals: Signals):
        self.checkpoint, self.signals = checkpoint, signals

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.signals.due is not None:
            trainer.save_checkpoint(self.checkpoint)


class StopOnSignal(SaveWhenDue):
    """The first SIGINT or SIGTERM ends the run after the current step with a checkpoint; a second one at once."""

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint, Signals())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here, and not in setup: Lightning has by now registered its own SIGTERM handler, which saves nothing.
        self.signals.listen()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        due = self.signals.due = self.signals.received
        super().on_train_batch_end(trainer, pl_module, *batch)
        if due is not None:
            raise Interrupted(
                f"Stopped by {signal.Signals(due).name} at step {trainer.global_step} of {trainer.max_steps}, saved as "
                f"{self.checkpoint}",
                due,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.signals.restore()
