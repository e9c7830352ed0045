"""The config of a run folder, `.hydra/config.yaml`. A `_target_` that has moved is replaced by its new name."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

MOVED = {
    "sae_lab.data.CachedData": "sae_lab.cache.data.CachedData",
    "sae_lab.data.disassembly": "sae_lab.activations.from_text.disassembly",
    "sae_lab.data.hub": "sae_lab.activations.from_text.hub",
    "sae_lab.data.stdlib": "sae_lab.activations.from_text.stdlib",
    "sae_lab.data.text_files": "sae_lab.activations.from_text.text_files",
    "sae_lab.keep.KeepSAEs": "sae_lab.training.callbacks.KeepSAEs",
    "sae_lab.logs.CSVLog": "sae_lab.training.loggers.CSVLog",
    "sae_lab.logs.WandbLog": "sae_lab.training.loggers.WandbLog",
    "sae_lab.saes.pursuit.PursuitSAE": "sae_lab.saes.pursuit_sae.PursuitSAE",
    "sae_lab.schedule.warmup_decay": "sae_lab.training.schedule.warmup_decay",
    "sae_lab.train.build_trainer": "sae_lab.training.trainer.build_trainer",
}
"""Old → new `_target_`. Keep an entry as long as runs with the old name must open."""


def config_file(folder: Path) -> Path:
    """Return the path of the config of a run folder."""
    return folder / ".hydra" / "config.yaml"


def read_config(folder: Path) -> DictConfig:
    """Read the config of a run folder, which must have one."""
    config = OmegaConf.create(update_targets(OmegaConf.to_container(OmegaConf.load(config_file(folder)))))
    assert isinstance(config, DictConfig)
    return config


def update_targets(tree: Any) -> Any:
    """Replace every `_target_` that has moved, at any depth."""
    if isinstance(tree, list):
        return [update_targets(node) for node in tree]
    if not isinstance(tree, dict):
        return tree
    return {k: MOVED.get(v, v) if k == "_target_" else update_targets(v) for k, v in tree.items()}
