"""The Lightning Trainer of a run."""

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from sae_lab.ops.matmul import Products
from sae_lab.parallel.environment import own_gpu, place
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.device import Precision, resolve_device
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.training.capture import Capture, PrepareSteps
from sae_lab.training.checkpoint_io import AtomicCheckpointIO


class NoSignalHandlers(_SignalConnector):
    """Installs no signal handlers.

    Lightning's would replace those of runtime/signals.py during `fit`, and end a run without a checkpoint.
    """

    def register_signal_handlers(self) -> None:
        """Do nothing."""


class ModelCheckpoint(of_lightning.ModelCheckpoint):
    """Saves checkpoints in a local folder. It has the name of Lightning's, by which checkpoints keep its state."""

    def setup(self, *_: Any, **__: Any) -> None:
        """Do nothing: the folder is given.

        Lightning's asks whether it is in object storage, for which it imports s3fs where that is installed: 0.4 s.
        """


GPU = ("cuda", "gpu")
NOISE = (
    "does not have many workers|dataloader is not resumable|LeafSpec|sync_dist|Checkpoint directory .* exists|"
    "ModelCheckpoint with manual optimization"
)
"""Warnings of Lightning about what is so on purpose."""


@check_arguments
def build_trainer(
    run_dir: Path,
    n_steps: int,
    callbacks: list[Callback],
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"],
    devices: Annotated[int, Ge(1)],
    precision: Precision,
    checkpoint_every: Annotated[int, Ge(1)],
    validate_every: Annotated[int, Ge(1)],
    log_every: Literal["auto"] | Annotated[int, Ge(1)],
    capture: Capture = "auto",
    products: Literal["auto"] | Products = "auto",
    micro_batches: Annotated[int, Ge(1)] = 1,
    shard_latents: Annotated[int, Ge(1)] = 1,
) -> L.Trainer:
    """Build a Lightning Trainer for one pass over a stream of n_steps batches.

    Uses max_steps only: Lightning 2.6 loses the position in the data on resume if anything reads its estimate of the
    number of steps.

    Args:
        run_dir: checkpoints go into its folder `checkpoints`.
        devices: number of processes; see conf/trainer/ddp.yaml.
        checkpoint_every, validate_every, log_every: intervals in steps. log_every=auto: 50, or fewer for 50 rows.
        capture, products: see training/capture.py.
        micro_batches: parts in which each process takes its batch; see training/micro_batches.py.
        shard_latents: processes among which the latents are divided; see conf/trainer/ddp.yaml and parallel/shards.py.

    Raises:
        UserError: there are fewer devices, the precision is unknown, or an interval is not positive.
    """
    device = resolve_device(accelerator, "accelerator")
    check_devices(device, devices)
    check_precision(device, precision)
    saving = ModelCheckpoint(
        run_dir / "checkpoints", "last", every_n_train_steps=checkpoint_every, enable_version_counter=False
    )
    return plain_trainer(
        accelerator=device,
        devices=[own_gpu() or 0] if device in GPU else 1,
        precision=precision,
        max_steps=n_steps,
        val_check_interval=min(validate_every, n_steps),
        log_every_n_steps=log_interval(log_every, n_steps),
        callbacks=[saving, PrepareSteps(capture, products, micro_batches), *callbacks],
        plugins=[AtomicCheckpointIO(run_dir)],
        default_root_dir=run_dir,
    )


def plain_trainer(**settings: Any) -> L.Trainer:
    """Build a Trainer for one epoch without the parts of Lightning that are not used: loggers, bars, samplers, signals.

    Raises:
        UserError: Lightning refuses the settings.
    """
    quiet_lightning()
    try:
        trainer = L.Trainer(
            **settings,
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as e:
        raise UserError(f"the trainer cannot be built: {' '.join(str(e).split())}") from e
    trainer._signal_connector = NoSignalHandlers(trainer)
    return trainer


def log_interval(log_every: Literal["auto"] | int, n_steps: int) -> int:
    """Return the steps between rows of the log. `auto` is 50, or fewer, so that a short run has about 50 rows."""
    return min(50, max(1, n_steps // 50)) if log_every == "auto" else min(log_every, n_steps)


def check_precision(device: str, precision: str) -> None:
    """Raise a SettingError for float16 on another device than a GPU, where Lightning would take bfloat16 instead."""
    if precision == "16-mixed" and device not in GPU:
        raise SettingError(
            "{precision}=16-mixed needs a GPU, since float16 products are not for a CPU: give {precision}=bf16-mixed."
        )


def training_device(accelerator: str) -> torch.device:
    """Return the device of a run that trains in one process. The language model may be on another one."""
    device = resolve_device(accelerator, "accelerator")
    return torch.device("cuda", 0) if device in GPU else torch.device(device)


def quiet_lightning() -> None:
    """Silence Lightning's tips and warnings about what is so on purpose. Its import sets its loggers to INFO."""
    warnings.filterwarnings("ignore", message=f".*({NOISE}).*")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def check_devices(device: str, n: int) -> None:
    """Raise a SettingError if n processes would not have a GPU each; on the CPU any number may run."""
    found, started = torch.cuda.device_count(), place()
    if started is not None:  # by torchrun or srun, perhaps on several machines
        n = 1 if own_gpu() is not None else started.local_size
    if n > 1 and device != "cpu" and not (device in GPU and n <= found):
        raise SettingError(f"{{devices}}={n} exceeds the {found} GPUs: give fewer, or {{accelerator}}=cpu.")
