"""The config of a run folder, `.hydra/config.yaml`, brought up to date: moved `_target_`s, settings added since."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_lab.runs.digests import SETTINGS, check_unaltered
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.files import read_small

OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
DEEPEST = 100
UNWANTED = (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken)
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
LOADED_LM = {"tokenizer": None, "base_model": None, "trust_remote_code": False, "load": None, "devices": None}
OF_ROWS = {"chat": "auto", "special_tokens": "text"}
OF_LINEAR = {"encoder_norm": "drawn", "b_dec_init": "zeros", "b_enc_init": "zeros", "unit_norm": True}
LINEAR_SAES = ("topk", "batch_topk", "matryoshka", "jumprelu", "gated", "vanilla", "cross_layer")
OF_JUMPRELU = {
    "calibrated": False,
    "kernel_gradient": "thresholds",
    "frequency_coefficient": 0.0,
    "frequency_scale": 0.1,
    "preact_coefficient": 0.0,
}
OF_SPARSE = {"signed": False, "l1_coefficient": 0.0}
SPARSE_SAES = (
    *("topk.TopKSAE", "batch_topk.BatchTopKSAE", "matryoshka.Matryoshka"),
    *("cross_layer.CrossLayerTopKSAE", "cross_layer.CrossLayerBatchTopKSAE"),
)
ADDED: dict[str, dict[str, Any]] = {
    "sae_lab.activations.from_text.": {
        "order": "as_read",
        "lm_batch_tokens": "auto",
        "exclude_tokens": [],
        "max_norm": None,
    },
    "sae_lab.activations.from_text.hub": {"held_out_every": None, "window_tokens": 16_777_216, **OF_ROWS},
    "sae_lab.activations.from_text.text_files": {"format": "auto", **OF_ROWS},
    "sae_lab.cache.data.CachedData": {
        "lm_batch_tokens": "auto",
        "exclude_tokens": [],
        "max_norm": None,
        "copies_gb": 100.0,
    },
    "sae_lab.saes.jumprelu.JumpReLUSAE": OF_JUMPRELU,
    "sae_lab.saes.cross_layer.CrossLayerJumpReLUSAE": OF_JUMPRELU,
    **{f"sae_lab.saes.{family}": OF_SPARSE for family in SPARSE_SAES},
    **{
        f"sae_lab.saes.{family}": {"unit_norm": True, "l1_coefficient": 0.0}
        for family in ("hierarchical_topk", "temporal")
    },
    "sae_lab.saes.p_anneal": {"unit_norm": True},
    "sae_lab.lm.paired.PairedLM": {"devices": None},
    **{f"sae_lab.lm.{back_end}.": LOADED_LM for back_end in ("transformers", "transformer_lens", "nnsight")},
    **{f"sae_lab.saes.{family}": OF_LINEAR for family in LINEAR_SAES},
    "sae_lab.saes.pursuit_sae": {"b_dec_init": "zeros", "signed": False},
}
"""`_target_` → settings that it has got since, with the values that mean "as before". A beginning that ends in a dot
stands for all streams of activations; the parts of a mixture (`_partial_`) have no settings of a stream."""


def config_file(folder: Path) -> Path:
    """Return the path of the config of a run folder."""
    return folder / ".hydra" / "config.yaml"


def environment_file(folder: Path) -> Path:
    """Return the path of the list of keys whose values came from the environment; there is one if there are any."""
    return folder / ".hydra" / "from_environment.txt"


def read_environment_keys(folder: Path) -> list[str]:
    """Return the keys of a run's config whose values came from the environment of the run."""
    file = environment_file(folder)
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def read_config(folder: Path) -> DictConfig:
    """Read the config of a run folder, which must have one.

    Raises:
        UserError: the file, overrides.yaml or metrics.json changed since the run wrote them, or the file holds what no
            run writes: YAML anchors, tags, or calls of resolvers.
    """
    check_unaltered(folder, *SETTINGS)
    config = OmegaConf.create(bring_up_to_date(read_plain(config_file(folder))))
    assert isinstance(config, DictConfig)
    return config


def read_plain(file: Path) -> dict[Any, Any]:
    """Read a YAML file as dicts, lists and values, and run or resolve nothing.

    A short file with anchors can stand for gigabytes, and a resolver such as `${oc.env:HOME}` reads the environment of
    whoever opens the file. A run writes neither.
    """
    plain = read_yaml(file)
    try:
        if not isinstance(plain, dict) or not plain:
            raise ValueError("it holds no settings")
        if called := [value for value in strings(plain) if "${" in value and ":" in value]:
            raise ValueError(f"it calls a resolver ({called[0]}), which no run writes")
    except ValueError as e:
        raise UserError(f"{file} cannot be read ({first_line(e)}): restore it, or train again.") from e
    return plain


def read_yaml(file: Path) -> Any:
    """Read a YAML file of a run folder as dicts, lists and values. Interpolations and resolvers stay strings."""
    try:
        text = read_small(file, limit=2**20)
        check_tokens(text)
        return OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{file} cannot be read ({first_line(e)}): restore it, or train again.") from e


def check_tokens(text: str) -> None:
    """Raise a ValueError if a YAML text holds what no run writes. Cheap: the first such token ends the look."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if isinstance(token, UNWANTED):
            raise ValueError("it holds YAML anchors or tags, which no run writes")
        if depth > DEEPEST:  # the time to scan grows with the square of the depth
            raise ValueError("it is nested too deeply")


def strings(node: Any) -> Iterator[str]:
    """Every string at or below a node: keys and values."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from (*strings(name), *strings(child))
    elif isinstance(node, list):
        for child in node:
            yield from strings(child)
    elif isinstance(node, str):
        yield node


def bring_up_to_date(tree: Any) -> Any:
    """Replace every `_target_` that has moved, and fill in the settings that were added since, at any depth."""
    if isinstance(tree, list):
        return [bring_up_to_date(node) for node in tree]
    if not isinstance(tree, dict):
        return tree
    node = {name: bring_up_to_date(child) for name, child in tree.items()}
    if isinstance(target := node.get("_target_"), str):
        node["_target_"] = target = MOVED.get(target, target)
        for beginning, settings in ADDED.items():
            if target.startswith(beginning) and not (beginning.endswith(".") and "_partial_" in node):
                node = settings | node
    return node
