"""Provenance of an SAE: what it was trained on, and with which versions."""

import platform
import subprocess
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sae_lab.runtime.private import private_values, public, public_text

PACKAGES = ("sae-lab", "torch", "lightning", "transformers", "transformer_lens", "datasets")


def provenance(
    config: dict[Any, Any], origin: dict[str, Any], from_environment: Collection[str] = ()
) -> dict[str, Any]:
    """Collect the provenance of an SAE: model, sites, tokenizer, BOS policy, text, options, versions, commit.

    It goes where the SAE goes, so secrets and folders are left out (see runtime/private.py).

    Args:
        config: the config of the run, with interpolations resolved.
        origin: model, sites, tokenizer, BOS and reading, as `StreamData.origin` returns them.
        from_environment: keys of the config whose values came from the environment.
    """
    hidden = private_values(OmegaConf.create(config), from_environment)
    config = public(config, from_environment)
    model, tokenizer = (with_public_name(origin[part], hidden) for part in ("model", "tokenizer"))
    folded = bool(config["lm"].get("compatibility_mode"))
    keys = ("lm", "data", "optimizer", "schedule", "n_tokens", "batch_size", "seed")
    return {
        "model": {
            "name": model["name"],
            "revision": model["revision"] or config["lm"].get("revision"),
            "processing": "layer norms folded, writes centred" if folded else "none",
        },
        "sites": origin["sites"],
        "tokenizer": tokenizer,
        **({"reading": origin["reading"]} if origin.get("reading") else {}),
        "bos": origin["bos"],
        **{key: config[key] for key in keys},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": current_commit(),
    }


def with_public_name(part: Any, hidden: Collection[str]) -> Any:
    """Return a part of the origin whose name holds nothing private; None if there is no such part."""
    return part | {"name": public_text(part["name"], hidden)} if part and part["name"] else part


def current_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if files differ from it; None for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None
