"""Callbacks that stop on a signal, and that keep SAEs during training."""

import signal
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge

from sae_lab.parallel.collectives import rank
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import Interrupted
from sae_lab.runtime.signals import Signals
from sae_lab.saes.files import save_sae


class SaveWhenDue(L.Callback):
    """Saves a checkpoint after a step if `signals.due` is set."""

    def __init__(self, checkpoint: Path, signals: Signals):
        self.checkpoint, self.signals = checkpoint, signals

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.signals.due is not None:
            trainer.save_checkpoint(self.checkpoint)


class StopOnSignal(SaveWhenDue):
    """Stops the run on a signal: saves a checkpoint after the current step. A second signal ends it at once.

    The signals are SIGINT, SIGTERM and, unless something else handles them, SIGHUP, SIGUSR1 and SIGUSR2.

    Raises:
        Interrupted: after the checkpoint is saved.
    """

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint, Signals())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not in `setup`: Lightning registers its own SIGTERM handler after that, and it saves no checkpoint.
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


class KeepSAEs(L.Callback):
    """Saves the SAE as `<folder>/<step>` every `every` steps (`callbacks=keep_saes`). Keeps all of them.

    An SAE folder has a third of the size of a checkpoint. It holds the SAE as it is during training: its threshold is
    the running estimate, which `calibrate` replaces after training.

    Args:
        folder: the parent folder.
        every: steps.

    Raises:
        UserError: `every` is not an integer of at least 1.
    """

    @check_arguments
    def __init__(self, folder: str | Path, every: Annotated[int, Ge(1)]):
        self.folder, self.every = Path(folder), every

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and rank() == 0:
            save_sae(pl_module.sae, self.folder / str(trainer.global_step))  # type: ignore[arg-type]
