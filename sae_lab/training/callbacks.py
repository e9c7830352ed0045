"""Callback that keeps SAEs during training."""

from pathlib import Path
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge

from sae_lab.parallel.collectives import rank
from sae_lab.runtime.checks import check_arguments
from sae_lab.saes.files import save_sae


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
