"""Provenance of an SAE: what it was trained on, and with which versions."""

import platform
import subprocess
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.private import private_values, public, public_text

PACKAGES = ("sae-lab", "torch", "lightning", "transformers", "transformer_lens", "datasets")


def provenance(
    config: dict[Any, Any],
    lm: LanguageModel,
    from_environment: Collection[str] = (),
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect the provenance of an SAE: model, sites, tokenizer, BOS policy, text, options, versions, commit.

    It goes where the SAE goes, so secrets and folders are left out (see runtime/private.py).

    Args:
        config: the config of the run, with interpolations resolved.
        from_environment: keys of the config whose values came from the environment.
        reading: how documents that are no plain text became ids (see TextSource).
    """
    hidden = private_values(OmegaConf.create(config), from_environment)
    config = public(config, from_environment)
    folded = bool(config["lm"].get("compatibility_mode"))
    revision = getattr(getattr(lm.model, "config", None), "_commit_hash", None)
    keys = ("lm", "data", "optimizer", "schedule", "n_tokens", "batch_size", "seed")
    return {
        "model": {
            "name": public_text(lm.name, hidden),
            "revision": revision or config["lm"].get("revision"),
            "processing": "layer norms folded, writes centred" if folded else "none",
        },
        "sites": list(lm.sites),
        "tokenizer": {"name": public_text(lm.tokenizer.name_or_path, hidden), "vocab_size": len(lm.tokenizer)},
        **({"reading": dict(reading)} if reading else {}),
        "bos": {"id": lm.bos_id, "policy": "first in every row of seq_len tokens, and between documents"},
        **{key: config[key] for key in keys},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": current_commit(),
    }


def current_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if files differ from it; None for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None
