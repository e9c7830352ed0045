"""The sentence about a key that the config does not have: which one was meant, and whether it can be added."""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_lab.cli.help import CONF, conf_file
from sae_lab.cli.overrides import choices_of
from sae_lab.runtime.build import OURS
from sae_lab.runtime.errors import UserError, join_keys

PEERS = {
    ("lr", "learning_rate"): "optimizer.lr",
    ("lr_warm_up_steps", "lr_warmup_steps", "warmup_steps"): "schedule.warmup",
    ("lr_decay_steps", "decay_start"): "schedule.decay",
    ("d_sae", "dict_size", "num_latents", "hidden_dim", "latent_size"): "n_latents",
    ("expansion_factor",): "expansion",
    ("top_k",): "k",
    ("l1_coeff", "l1_penalty", "l1_lambda", "sparsity_penalty"): "sae.l1_coefficient",
    ("auxk_alpha", "aux_penalty"): "sae.auxk_coefficient",
    ("n_batches_to_dead", "dead_feature_window", "dead_feature_threshold"): "sae.dead_after",
    ("normalize_activations",): "sae.normalize",
    ("normalize_decoder",): "sae.unit_norm",
    ("architecture", "type"): "sae=NAME",
    ("model", "model_name", "lm_name", "language_model_path"): "lm.name",
    (
        "layer",
        "layers",
        "layer_name",
        "hook_name",
        "hook_layer",
        "hook_point",
        "hookpoints",
        "submodule_name",
    ): "lm.sites",
    ("context_size", "ctx_len", "max_length"): "seq_len",
    ("dataset", "dataset_path", "dataset_name", "train_path"): "data=NAME",
    ("training_tokens", "num_tokens", "num_samples", "total_training_tokens"): "n_tokens",
    ("steps", "num_steps", "total_training_steps", "num_epochs", "epochs"): "n_tokens",
    ("train_batch_size_tokens", "train_batch_size"): "batch_size",
    ("store_batch_size_prompts", "model_batch_size", "llm_batch_size"): "data.lm_batch_rows",
    ("refresh_batch_size",): "data.lm_batch_rows",
    ("grad_acc_steps", "micro_acc_steps"): "trainer.micro_batches",
    ("device", "accelerator"): "trainer.accelerator",
    ("eval_every",): "trainer.validate_every",
    ("save_every",): "trainer.checkpoint_every",
    ("log_to_wandb", "use_wandb", "wandb_project"): "logger=wandb",
}
"""Names of arguments in SAELens, dictionary_learning, sparsify and the works of docs/origin.md -> what to type here."""


def unknown_key(key: str, config_name: str, overrides: Sequence[str]) -> str:
    """Return the sentence about an unknown key."""
    parent, _, leaf = key.rpartition(".")
    config = composed(key, config_name, overrides)
    node = OmegaConf.select(config, parent) if parent else config
    known = [str(k) for k in node if not str(k).startswith("_")] if isinstance(node, DictConfig) else []
    if leaf in known:  # a sweep composes all of its jobs before the first one starts
        return f"{parent or 'the config'} has no key {leaf} in some jobs of this sweep: sweep only jobs that have it."
    what = f"{parent or 'the config'} has no key {leaf}"
    if elsewhere := same_elsewhere(leaf, config):
        return f"{what}: did you mean {' or '.join(elsewhere)}?"
    close = difflib.get_close_matches(leaf, known, n=1)
    hint = f"did you mean {close[0]}? It" if close else "it"
    listing = f"{hint} has {', '.join(known)}" if known else "`--cfg job` prints every key"
    typed = next((o for o in overrides if o.startswith(f"{key}=")), f"{key}=...")
    return f"{what}: {listing}{f'; +{typed} adds it' if can_be_added(config, parent, leaf) else ''}."


def composed(key: str, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config of a command without an unknown key; empty if that cannot be composed, either."""
    kept = [o for o in overrides if not o.startswith(("-", f"{key}=")) and "," not in o and "=" in o]
    running = GlobalHydra.instance().hydra  # that of a sweep, which has other jobs to start
    for some in (kept, [o for o in kept if choices_of(o.partition("=")[0])]):  # another override may be wrong as well
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                return hydra.compose(config_name, overrides=some)
        except (HydraException, OmegaConfBaseException):
            continue
        finally:
            GlobalHydra.instance().hydra = running
    return OmegaConf.create({})


def same_elsewhere(leaf: str, config: DictConfig) -> list[str]:
    """Return the keys of a config that other libraries call `leaf`, or else those that end in it."""
    values = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    meant = next((ours for names, ours in PEERS.items() if leaf in names), None)
    if meant is not None and (meant in values or meant.partition("=")[0] in config):
        return [meant]
    return [key for key, value in values.items() if key.endswith(f".{leaf}") and not is_interpolation(value)][:3]


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config that are no parts of it, with their values."""
    if isinstance(node, Mapping) and node:
        for name, child in node.items():
            yield from leaves(child, join_keys(key, str(name)))
    else:
        yield key, node


def is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")


def can_be_added(config: DictConfig, parent: str, leaf: str) -> bool:
    """Return whether something would read a key that conf/ does not have.

    conf/ has all settings of this package. Others' classes may take more, and so do mappings such as lm.load.
    """
    node = OmegaConf.select(config, parent) if parent else None
    if not isinstance(node, DictConfig):
        return False
    target = OmegaConf.to_container(node, resolve=False).get("_target_")  # type: ignore[union-attr]
    if target is None:
        return True
    return isinstance(target, str) and not target.startswith(OURS) and takes(target, leaf)


def takes(target: str, argument: str) -> bool:
    """Return whether a function or class has an argument of this name, or takes any."""
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except (ImportError, ValueError, TypeError):
        return False
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_added(cfg: DictConfig, config_name: str, overrides: Sequence[str]) -> None:
    """Refuse a top-level key that was added by `+KEY=VALUE` where another key was meant. Others are labels of a run.

    Raises:
        UserError: nothing reads the key, and the config has one of that name elsewhere.
    """
    added = [override for override in overrides if override.startswith("+")]
    own = OmegaConf.load(conf_file(config_name)) if added else cfg
    for override in added:
        key = override.lstrip("+").partition("=")[0]
        read = key in own or f"${{{key}}}" in OmegaConf.to_yaml(cfg)
        if key in cfg and not read and not OmegaConf.is_dict(cfg[key]) and same_elsewhere(key, cfg):
            raise UserError(unknown_key(key, config_name, [o.lstrip("+") if o == override else o for o in overrides]))
