"""Validation of the top-level options of a run."""

import logging
from typing import Annotated, Literal, TypedDict

import torch
from annotated_types import Ge, Gt, Len, Lt
from omegaconf import DictConfig
from pydantic import AfterValidator

from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_config
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import SettingError, settings_under
from sae_lab.training.trainer import GPU, build_trainer

log = logging.getLogger(__name__)

Betas = Annotated[
    list[Annotated[float, Ge(0), Lt(1), AfterValidator(float)]],  # torch takes no whole numbers here
    Len(2, 2),
    ErrorMessage("must be two numbers from 0 to below 1, such as [0.9,0.99]"),
]


class Size(TypedDict):
    """The options that define the size of the dictionary."""

    expansion: Annotated[float, Ge(0)] | None
    n_latents: Annotated[int, Ge(1)] | None


class Options(TypedDict):
    """The other top-level options of conf/train.yaml."""

    k: Annotated[float, Ge(0)]
    n_tokens: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    seq_len: Annotated[int, Ge(2)]
    seed: Annotated[int, Ge(0)]
    max_grad_norm: Annotated[float, Gt(0)] | None
    calibration_batches: Annotated[int, Ge(1)]
    goal_l0: Annotated[float, Ge(0)] | None
    init_from: str | None
    loss: Literal["kl_mse"] | None
    run_dir: str


def check_options(cfg: DictConfig) -> None:
    """Check the top-level options of a run, and those of its trainer and its optimizer, before any slow work.

    Raises:
        SettingError: an option is invalid, or two options contradict each other.
    """
    check_config(cfg, Options)
    if cfg.init_from == "required":
        raise SettingError("This experiment goes on from a trained SAE: give init_from=FOLDER, such as outputs/demo.")
    with settings_under("trainer"):
        check_config(cfg.trainer, build_trainer)
    check_optimizer(cfg)
    check_size(cfg)
    check_shares(cfg)
    check_parts(cfg)
    if cfg.get("loss") and cfg.trainer.micro_batches > 1:
        raise SettingError(
            f"loss={cfg.loss} is computed on whole batches, pass by pass of the language model: give "
            "trainer.micro_batches=1."
        )
    check_lm_device(cfg)


def check_shares(cfg: DictConfig) -> None:
    """Raise a SettingError if latents or rows cannot be shared out equally among the processes."""
    n, m = cfg.trainer.devices, cfg.trainer.get("shard_latents", 1)
    if n % m:
        raise SettingError(
            f"trainer.shard_latents={m} must divide trainer.devices={n}: give trainer=ddp trainer.devices={m}, or a "
            "multiple of that."
        )
    shares = f"trainer.devices={n}" + (f" / trainer.shard_latents={m}" if m > 1 else "")
    for key in ("batch_size", "n_tokens"):
        if cfg[key] % (n // m):
            raise SettingError(f"{key}={cfg[key]} must be a multiple of {shares}.")


def check_parts(cfg: DictConfig) -> None:
    """Raise a SettingError if a process would take its rows of a batch in more parts than it has rows."""
    parts = cfg.trainer.micro_batches
    rows = cfg.batch_size // (cfg.trainer.devices // cfg.trainer.get("shard_latents", 1))
    if parts > rows:
        raise SettingError(
            f"trainer.micro_batches={parts} is the number of parts of a batch, not their size, and a process has only "
            f"{rows} rows: give a small number, such as {min(4, rows)}."
        )


def check_lm_device(cfg: DictConfig) -> None:
    """Raise a SettingError if several processes would put their language models on one GPU: nccl needs one each.

    Warn of GPUs among lm.devices that train as well.
    """
    device = cfg.lm.get("device")
    if cfg.trainer.devices > 1 and ":" in str(device):
        raise SettingError(
            f"lm.device={device} would be that of every one of trainer.devices={cfg.trainer.devices} processes: "
            "give lm.device=auto, or GPUs of its own as lm.devices=[...]."
        )
    with settings_under("trainer"):
        trains_on = resolve_device(cfg.trainer.accelerator, "accelerator")
    if trains_on in GPU:
        training = [str(i) for i in range(min(cfg.trainer.devices, torch.cuda.device_count()))]
        both = [device for device in cfg.lm.get("devices") or [] if str(device).removeprefix("cuda:") in training]
        if both:
            log.warning("GPUs %s of lm.devices train the SAE as well: leave them out to train faster.", both)


def check_size(cfg: DictConfig) -> None:
    """Check the options that define the size of the dictionary.

    Raises:
        SettingError: one is invalid, or both are null.
    """
    check_config(cfg, Size)
    if cfg.n_latents is None and cfg.expansion is None:
        raise SettingError(
            "n_latents=null with expansion=null does not define the size of the dictionary: give one of them."
        )


def check_optimizer(cfg: DictConfig) -> None:
    """Check the settings that torch's optimizers share.

    Raises:
        SettingError: a setting is out of range.
    """
    with settings_under("optimizer"):
        check_config(cfg.optimizer, OptimizerSettings)


class OptimizerSettings(TypedDict):
    """Settings of an optimizer, by their names in torch.optim."""

    lr: Annotated[Annotated[float, Gt(0)] | Literal["auto"], ErrorMessage("must be a number above 0, or auto")]
    eps: Annotated[float, Ge(0)]
    weight_decay: Annotated[float, Ge(0)]
    betas: Betas
    fused: bool | None
