"""Callbacks: keep SAEs of the middle of training or the best one, and log what x_hat costs the language model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
from annotated_types import Ge

from sae_lab.activations.data import ActivationData
from sae_lab.evaluation.splice_ce import SpliceCost
from sae_lab.parallel.group import on_rank_0
from sae_lab.parallel.mesh import data_axis, rank
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_json, write_json
from sae_lab.saes.files import save_sae

RECORD = "best.json"
SPLICED = ("ce_degradation", "loss_recovered")
"""What SpliceCE logs, each as `val/<name>`."""


def save(module: L.LightningModule, folder: Path) -> None:
    """Save the SAE in training, with the provenance of its run."""
    save_sae(module.sae, folder, module.provenance())  # type: ignore[arg-type,operator]


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
        if trainer.global_step % self.every == 0 and data_axis().index == 0:
            save(pl_module, self.folder / str(trainer.global_step))


class SpliceCE(L.Callback):
    """Logs `val/ce_degradation` and `val/loss_recovered` at every validation (`callbacks=splice_ce`).

    They are the evaluation's metrics of these names, under the deployed rule, with the threshold of that moment.

    Args:
        n_tokens: held-out tokens; None: those of the validation, `data.n_val_tokens`.

    Raises:
        UserError: `n_tokens` is not an integer of at least 1. Training starts without a language model.
    """

    @check_arguments
    def __init__(self, n_tokens: Annotated[int, Ge(1)] | None = None):
        self.n_tokens = n_tokens
        self.cost: SpliceCost | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cost = self.cost or self.measure(trainer.datamodule)  # type: ignore[attr-defined]
        values = {f"val/{name}": value for name, value in self.cost(pl_module.sae).items()}  # type: ignore[arg-type]
        pl_module.log_dict(pl_module.finite(values))  # type: ignore[operator]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ActivationData):
            raise UserError(f"callbacks=splice_ce needs a language model, and {data.name} has none: leave it out.")

    def measure(self, data: ActivationData) -> SpliceCost:
        """Choose the held-out text."""
        return SpliceCost(data, self.n_tokens or data.n_val_tokens)


class KeepBest(L.Callback):
    """Keeps the SAE that was best at a validation, in `folder` (`callbacks=keep_best`).

    Beside it, best.json says at which step, by which metric and with which value. A resumed run goes on from there.
    As with KeepSAEs, the threshold is the running estimate.

    Args:
        folder: where to save it.
        metric: name of a value that validation logs, such as `val/fvu`; with `callbacks=[splice_ce,keep_best]` also
            `val/loss_recovered`.
        mode: whether a small (`min`) or a large value (`max`) is good.

    Raises:
        UserError: `mode` is unknown. At the start, `metric` is one of SpliceCE, which is missing; at the first
            validation, it is not logged.
    """

    @check_arguments
    def __init__(self, folder: str | Path, metric: str = "val/fvu", mode: Literal["min", "max"] = "min"):
        self.folder, self.metric, self.mode = Path(folder), metric, mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        of_splice = {f"val/{name}" for name in SPLICED}
        others = trainer.callbacks  # type: ignore[attr-defined]
        if self.metric in of_splice and not any(isinstance(other, SpliceCE) for other in others):
            raise UserError(
                f"callbacks.keep_best.metric={self.metric} is logged by splice_ce only: type "
                "callbacks=[splice_ce,keep_best]."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and rank() == 0:  # what another run has left there
            (self.folder / RECORD).unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        logged = trainer.callback_metrics
        if self.metric not in logged:
            known = ", ".join(sorted(name for name in logged if name.startswith("val/")))
            raise UserError(
                f"callbacks.keep_best.metric={self.metric} is not logged at validation: give one of {known}."
            )
        value = float(logged[self.metric])
        if on_rank_0(lambda: self.improves(value)) and data_axis().index == 0:
            save(pl_module, self.folder)
            said = {"metric": self.metric, "mode": self.mode, "value": value, "step": trainer.global_step}
            if rank() == 0:  # last: if the run stops before, it saves the same SAE again
                write_json(self.folder / RECORD, said)

    def improves(self, value: float) -> bool:
        """Return whether the value is better than that of the SAE in the folder, or there is none by this metric."""
        if not (self.folder / RECORD).is_file():
            return True
        best = read_json(self.folder / RECORD)
        if (best["metric"], best["mode"]) != (self.metric, self.mode):
            return True
        return value < best["value"] if self.mode == "min" else value > best["value"]
