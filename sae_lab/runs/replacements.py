"""Settings of a run's language model and data that an evaluation replaces, and the names of its files then."""

import difflib
import inspect
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.stream import StreamData
from sae_lab.runs.folder import differing_keys, flatten
from sae_lab.runtime.errors import UserError

SECTIONS = ("lm", "data")
LONGEST = 80


class Default(NamedTuple):
    """The value of a setting if the run has none."""

    value: Any = None


def stream_settings() -> set[str]:
    """Return the settings that data of any kind may have, such as seq_len. Other data keep the run's."""
    parameters = [
        *inspect.signature(StreamData).parameters.values(),
        *inspect.signature(ActivationData).parameters.values(),
        *inspect.signature(from_documents).parameters.values(),
    ]
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def replace_settings(run: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """Return the config of a run with other settings of its language model and its data.

    Args:
        settings: values by their full key, such as `{"data.lm_batch_rows": 8}`. With a `data._target_` or a
            `lm._target_`, these are all settings of the data or the language model.

    Raises:
        UserError: the run has no such setting.
    """
    tree: Any = OmegaConf.to_container(run)
    own = flatten(tree)
    settings = {k: own.get(k, v.value) if isinstance(v, Default) else v for k, v in settings.items()}
    for section in SECTIONS:
        if f"{section}._target_" in settings:
            tree[section] = skeleton(section, settings)
    for key, value in settings.items():
        parent, _, leaf = key.rpartition(".")
        node = tree
        for name in parent.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if parent.partition(".")[0] not in SECTIONS or not isinstance(node, dict) or leaf not in node:
            raise UserError(f"{key} is not a setting of this run: {describe(parent, leaf, node)}.")
        node[leaf] = value
    replaced = OmegaConf.create(tree)
    assert isinstance(replaced, DictConfig)
    return replaced


def skeleton(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with a place for each of the settings below it."""
    root: dict[str, Any] = {}
    for key in settings:
        if key.startswith(f"{section}."):
            *parents, leaf = key.split(".")[1:]
            node = root
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = None
    return root


def is_choice(node: Any) -> bool:
    """Return whether a section of a config says what to build."""
    return isinstance(node, Mapping) and isinstance(node.get("_target_"), str)


def describe(parent: str, leaf: str, node: Any) -> str:
    """Return what a part of a config has, and which of it may have been meant, for an error message."""
    names = [str(name) for name in node if str(name)[0] != "_"] if isinstance(node, dict) else []
    if parent == "data" and leaf in stream_settings():
        return f"the run's data has no such setting, only other data do: leave it out; data has {', '.join(names)}"
    close = difflib.get_close_matches(leaf, names, n=1)
    hint = f"did you mean {parent}.{close[0]}? " if close else ""
    return f"{hint}{parent} has {', '.join(names) or 'no settings'}"


def replaced_settings(before: DictConfig, after: DictConfig) -> dict[str, Any]:
    """Return the settings of `after` that differ from `before` and change numbers, by their full key."""
    here = flatten(plain(after))
    return {key: here[key] for key in sorted(differing_keys(plain(before), plain(after))) if key in here}


def suffix_of(settings: Mapping[str, Any]) -> str:
    """Return the end of the names of files for an evaluation with these settings, such as `_n_eval_tokens=1000000`.

    Empty if there are none. Characters that a file name should not have become `_`; such names and long ones end in a
    checksum of the settings, so that two evaluations with different settings have different names.
    """
    if not settings:
        return ""
    text = ",".join(f"{short(key)}={show(key, value)}" for key, value in settings.items())
    name = re.sub(r"[^\w.=,+-]+", "_", text, flags=re.ASCII)
    if name == text and len(name) <= LONGEST:
        return f"_{name}"
    return f"_{name[:LONGEST]}-{zlib.crc32(json.dumps(settings, default=str).encode()):08x}"


def short(key: str) -> str:
    """Return a key as it stands in a file name: `n_eval_tokens`, `lm.name`, and `data` for its `_target_`."""
    return key.removesuffix("._target_") if key.endswith("._target_") else key.removeprefix("data.")


def show(key: str, value: Any) -> str:
    """Return a value as it stands in a file name: the last part of a `_target_`."""
    return str(value).rpartition(".")[2] if key.endswith("._target_") else str(value)


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the sections of a config that an evaluation may replace, as dicts, lists and values."""
    return {section: OmegaConf.to_container(config[section]) for section in SECTIONS}
