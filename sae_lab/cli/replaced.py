"""`lm.KEY=VALUE` and `data.KEY=VALUE` of commands that open a run: they replace settings of the run's own config."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sae_lab.cli.entry import section_from

RUN_KEY = re.compile(r"(lm|data)\.[^=]*=")


def allow_new_keys(arguments: Sequence[str]) -> list[str]:
    """Let Hydra take keys of `lm` and `data` that the command's own config does not have: `lm.x=1` → `++lm.x=1`."""
    return [f"++{argument}" if RUN_KEY.match(argument) else argument for argument in arguments]


def replaced_from(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings below `lm` and `data` that were typed, and those of a choice `data=...`, by their full key.

    Settings of every stream, which a choice has too, count only if they were typed or the run has none.

    Raises:
        UserError: a value stands in the place of `lm` or `data`.
    """
    from sae_lab.runs.folder import flatten  # imported here, because it imports torch
    from sae_lab.runs.replacements import SECTIONS, Default, stream_settings

    typed = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    found: dict[str, Any] = {}
    for section in SECTIONS:
        node = section_from(cfg, section)
        kept = stream_settings() if "_target_" in node else set()
        for name in map(str, node):
            key = f"{section}.{name}"
            if name not in kept or key in typed:
                found |= flatten(value_of(node, name), key)
            elif OmegaConf.is_interpolation(node, name):  # to an option of `train`
                found[key] = Default()
            else:
                found[key] = Default(value_of(node, name))
    return found


def value_of(node: DictConfig, name: str) -> Any:
    """Return the value of a key as dicts, lists and values, with interpolations resolved."""
    value = node[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
