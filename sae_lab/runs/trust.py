"""What the config of a run folder may have built. A folder that somebody sent runs no code of its own."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_lab.runtime.errors import UserError, join_keys
from sae_lab.saes.base import BaseSAE

TEXT, LM, TRAINING = "sae_lab.activations.from_text", "sae_lab.lm", "sae_lab.training"
STUDIES = "sae_lab.studies"
TRUSTED = {
    "data": {f"{TEXT}.{name}" for name in ("disassembly", "hub", "in_memory", "stdlib", "text_files", "tokens")}
    | {"sae_lab.activations.mixture.mixture", "sae_lab.activations.tensor.TensorData", "sae_lab.cache.data.CachedData"},
    "lm": {
        *(f"{LM}.nnsight.NnsightLM", f"{LM}.none.NoLM", f"{LM}.paired.PairedLM"),
        *(f"{LM}.transformer_lens.TransformerLensLM", f"{LM}.transformers.TransformersLM"),
    },
    "callbacks": {f"{TRAINING}.callbacks.{name}" for name in ("KeepBest", "KeepSAEs", "SpliceCE")},
    "logger": {
        *(f"{TRAINING}.loggers.CSVLog", f"{TRAINING}.loggers.WandbLog"),
        "lightning.pytorch.loggers.TensorBoardLogger",
    },
    "planted": {f"{STUDIES}.hierarchy.HierarchicalFeatures", f"{STUDIES}.planted_features.PlantedFeatures"},
    "schedule": {f"{TRAINING}.schedule.cosine", f"{TRAINING}.schedule.warmup_decay"},
    "trainer": {f"{TRAINING}.trainer.build_trainer"},
}
"""The `_target_`s of conf/ but for SAEs and optimizers, by the top-level key below which each may stand. (A logger
below `data` would start where data are built.) Whole names and no prefix: a module of this package has others' names in
it, as `sae_lab.runs.provenance.subprocess.run` shows."""
SAFE_OPTIONS = {"attn_implementation": ("eager", "sdpa", "flex_attention"), "quantization_config": None}
"""What a run's `lm.load` may hold, and with which values (None: any). Other names of kernels are repositories,
whose code is downloaded and run."""


def check_trusted(config: Any, source: Path, trust: Sequence[str] | str = ()) -> None:
    """Check every `_target_` of a plain config, at any depth, before anything is built from it.

    Args:
        config: dicts, lists and values, without interpolations.
        source: the file that the config was read from, for the message.
        trust: modules or whole names that the user trusts, such as `my_saes.relative`; keys, such as
            `lm.trust_remote_code`.

    Raises:
        UserError: a `_target_` is not an SAE, a loader or a schedule of this package, not an optimizer of torch.optim,
            and not within `trust`; or a language model is to run code that comes with it.
    """
    trusted = [trust] if isinstance(trust, str) else [*trust]
    for key, what in code_of_models(config):
        if not is_within(key, trusted):
            raise UserError(f"{source} asks to {what} ({key}): look at it, and if you trust it, add trust={key}.")
    for key, target in targets(config):
        if isinstance(target, str) and (is_ours(target, key.partition(".")[0]) or is_within(target, trusted)):
            continue
        module = target.rpartition(".")[0] or target if isinstance(target, str) else "..."
        raise UserError(
            f"{source} asks to run {target} ({key}), which is not part of this package in that place: look at the "
            f"code, and if you trust it, add trust={module}."
        )


def code_of_models(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of settings that let code of a model run, with what they ask for."""
    listed = isinstance(node, list)
    for name, child in enumerate(node) if listed else node.items() if isinstance(node, dict) else ():
        here = f"{key}[{name}]" if listed else join_keys(key, str(name))
        if name == "trust_remote_code" and child not in (False, None):
            yield here, "run code that comes with a model"
        elif name == "load" and key.partition(".")[0] == "lm" and (unsafe := unsafe_options(child)):
            yield here, f"load a model with {unsafe}"
        else:
            yield from code_of_models(child, here)


def unsafe_options(load: Any) -> str:
    """Return the settings of `lm.load` that may run code, such as kernels of the hub; empty if there are none."""
    options = load.items() if isinstance(load, dict) else [("load", load)] if load is not None else []
    return ", ".join(f"{name}={value}" for name, value in options if not is_safe(name, value))


def is_safe(name: str, value: Any) -> bool:
    """Return whether an argument of `from_pretrained` runs no code but that of `transformers`."""
    values = SAFE_OPTIONS.get(name, ())
    return values is None or (isinstance(value, str) and value in values)


def targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The `_target_`s at or below a node, with their keys."""
    if isinstance(node, dict):
        for name, child in node.items():
            if name == "_target_":
                yield join_keys(key, "_target_"), child
            else:
                yield from targets(child, join_keys(key, str(name)))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from targets(child, f"{key}[{i}]")


def is_ours(target: str, place: str) -> bool:
    """Whether conf/ uses the name below this top-level key, or it is an SAE or an optimizer of torch in its place."""
    module, _, name = target.rpartition(".")
    if place == "optimizer" and module == "torch.optim":
        found = getattr(torch.optim, name, None)
        return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    sae = BaseSAE.registry.get(name)
    is_sae = place == "sae" and sae is not None and sae.__module__ == module and module.startswith("sae_lab.saes.")
    return is_sae or target in TRUSTED.get(place, ())


def is_within(target: str, trusted: Sequence[str]) -> bool:
    """Whether the target is one of the trusted names, or lies in a trusted module."""
    return any(target == name or target.startswith(f"{name}.") for name in trusted if name)
