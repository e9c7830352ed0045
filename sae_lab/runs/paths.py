"""The settings of a run that are paths: absolute in its folder, so that the run opens from anywhere; they may move."""

import os
from pathlib import Path
from typing import Any

MODELS = tuple(f"{lm}.{key}" for lm in ("lm", "lm.base", "lm.tuned") for key in ("name", "tokenizer", "base_model"))
MIXTURE = ("parts", "sources")
TEXTS = ("data", *(f"data.{name}.*" for name in MIXTURE))  # `*`: each part of a mixture, in a list or by name
MAY_MOVE = (*MODELS, "data.paths")
"""Keys that may change when a run is resumed or evaluated: digests of weights, tokenizer and text tell whether what is
there is the same. `data.path` of FILES belongs to them, but not that of a data set on the hub."""
CACHED = "sae_lab.cache.data.CachedData"
FILES = (CACHED, "sae_lab.activations.tensor.TensorData")
"""Data whose `data.path` is a path and never a name on the hub."""


def may_move(config: Any) -> tuple[str, ...]:
    """Return the keys of MAY_MOVE for a run of this config (nested dicts)."""
    data = config.get("data")
    if not isinstance(data, dict):
        return MAY_MOVE
    if data.get("_target_") in FILES:
        return (*MAY_MOVE, "data.path")
    parts = (f"data.{name}{key}" for name in MIXTURE for key in keys_below(data.get(name)))
    return (*MAY_MOVE, *(f"{part}.paths" for part in parts))


def keys_below(node: Any) -> list[str]:
    """Return what follows the key of a list or a dict in those of its children: `[0]` or `.name`."""
    if isinstance(node, list):
        return [f"[{i}]" for i in range(len(node))]
    return [f".{name}" for name in node] if isinstance(node, dict) else []


def with_absolute_paths(config: Any) -> Any:
    """Return a config (nested dicts) whose relative paths start at the working directory.

    What may also be a name on the hub (`lm.name=gpt2`) or an URL is a path if a file or folder of that name exists.
    """
    for key in (*MODELS, *(f"{text}.path" for text in TEXTS), "init_from"):
        config = replaced(config, key.split("."), lambda value: absolute(value) if exists(value) else value)
    for text in TEXTS:
        config = replaced(config, [*text.split("."), "paths"], absolute)
    return config


def replaced(node: Any, key: list[str], change: Any) -> Any:
    """Return nested dicts with the strings at a key changed: a string, or those of a list. Leave `node` as it is.

    `*` in a key stands for every child of a list or a dict.
    """
    if key[0] == "*" and isinstance(node, list):
        return [replaced(child, key[1:], change) for child in node]
    if key[0] == "*" and isinstance(node, dict):
        return {name: replaced(child, key[1:], change) for name, child in node.items()}
    if not isinstance(node, dict) or key[0] not in node:
        return node
    child = node[key[0]]
    if len(key) > 1:
        return node | {key[0]: replaced(child, key[1:], change)}
    if isinstance(child, list):
        return node | {key[0]: [change(value) if isinstance(value, str) else value for value in child]}
    return node | {key[0]: change(child)} if isinstance(child, str) else node


def exists(value: str) -> bool:
    """Return whether a relative path is of a file or a folder here."""
    return bool(value) and Path(value).exists()


def absolute(value: str) -> str:
    """Return a path or a glob with the working directory before it; one with `~`, a root or a scheme stays."""
    return value if "://" in value or value.startswith("~") or not value else os.path.join(Path.cwd(), value)  # noqa: PTH118
