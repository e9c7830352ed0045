"""Validation of the top-level options of a run."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from sae_lab.runtime.checks import checked_number
from sae_lab.runtime.errors import UserError


def check_options(cfg: DictConfig) -> None:
    """Validate top-level options: type, integer where required, minimum.

    Raises:
        UserError: an option is invalid.
    """
    whole = {"n_latents": 1, "n_tokens": 1, "batch_size": 1, "seq_len": 2, "seed": 0, "calibration_batches": 1}
    whole |= {f"trainer.{name}": 1 for name in ("devices", "checkpoint_every", "validate_every", "log_every")}
    dials = whole | {"k": 0, "expansion": 0, "goal_l0": 0}
    optional = {"n_latents", "expansion", "goal_l0"}
    for key, least in dials.items():
        value = OmegaConf.select(cfg, key, default=least)
        if value is not None or key not in optional:
            checked_number(key, value, least, whole=key in whole)
    checked_number("max_grad_norm", cfg.max_grad_norm, above=0, optional=True)
    check_optimizer(cfg)
    if cfg.n_latents is None and cfg.expansion is None:
        raise UserError("n_latents=null with expansion=null leaves the size of the dictionary open: give one of them.")
    for key in ("batch_size", "n_tokens"):
        if cfg[key] % cfg.trainer.devices:
            raise UserError(f"{key}={cfg[key]} cannot be shared out equally: give a multiple of trainer.devices.")


def check_optimizer(cfg: DictConfig) -> None:
    """Validate the optimizer's options: lr > 0, eps and weight_decay >= 0, two betas in [0, 1)."""
    checked_number("optimizer.lr", OmegaConf.select(cfg, "optimizer.lr", default=1), above=0)
    for name in ("eps", "weight_decay"):
        checked_number(f"optimizer.{name}", OmegaConf.select(cfg, f"optimizer.{name}", default=0), 0)
    betas = OmegaConf.select(cfg, "optimizer.betas", default=[0, 0])
    shares = [b for b in betas if isinstance(b, int | float) and 0 <= b < 1] if isinstance(betas, Sequence) else []
    if len(shares) != 2 or len(betas) != 2:
        raise UserError(f"optimizer.betas={betas} must be two numbers from 0 to below 1, such as [0.9,0.99].")
