"""SAEs kept from the middle of training, for those who study how it goes."""

from pathlib import Path
from typing import Any

import lightning as L

from sae_lab.parallel.collectives import rank
from sae_lab.runtime.checks import checked_number
from sae_lab.saes.files import save_sae


class KeepSAEs(L.Callback):
    """`callbacks=keep_saes`: every so many steps an SAE folder, a third the size of a checkpoint and never overwritten.

    It holds what training holds then: a threshold that `calibrate` will replace is still the running one.

    Args:
        folder: in which <step>/ is made.
        every: steps.

    Raises:
        UserError: `every` is no whole number of at least 1.
    """

    def __init__(self, folder: str, every: int):
        self.folder, self.every = Path(folder), checked_number("callbacks.keep_saes.every", every, 1, whole=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and rank() == 0:
            save_sae(pl_module.sae, self.folder / str(trainer.global_step))  # type: ignore[arg-type]
