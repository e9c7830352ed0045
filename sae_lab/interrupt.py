"""SIGINT and SIGTERM while training: finish the step, save a checkpoint, leave."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from sae_lab.errors import Interrupted


class StopOnSignal(L.Callback):
    """The first SIGINT or SIGTERM ends the run after the current step with a checkpoint; a second one at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self._received: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Here, and not in setup: Lightning has by now registered its own SIGTERM handler, which saves nothing.
        self._handlers = {s: signal.signal(s, self._note) for s in self.SIGNALS}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise Interrupted("Stopped at once by a second signal; the last checkpoint stands.", signum)
        self._received = signum

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._received is not None:
            trainer.save_checkpoint(self.checkpoint)
            name = signal.Signals(self._received).name
            raise Interrupted(
                f"Stopped by {name} at step {trainer.global_step} of {trainer.max_steps}, saved as {self.checkpoint}: "
                "the same command into the same folder continues.",
                self._received,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
