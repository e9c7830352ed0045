"""Where an SAE comes from, and a probe that tells whether it still does what it did when it was saved."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from sae_lab.lm.base import LanguageModel
from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

PACKAGES = ("sae-lab", "torch", "lightning", "transformers", "transformer_lens", "datasets")
TOLERANCE = 1e-3
"""Relative; another processor's rounding stays below 1e-5."""
TIES = 1 / 8
"""The share of probe rows on which rounding may decide between nearly equal latents; a changed rule shows on most."""


def provenance(config: dict[Any, Any], lm: LanguageModel) -> dict[str, Any]:
    """What an SAE was trained on and by: model, sites, tokenizer, BOS policy, text, dials, versions, commit."""
    folded = bool(config["lm"].get("compatibility_mode"))
    revision = getattr(getattr(lm.model, "config", None), "_commit_hash", None)
    keys = ("lm", "data", "optimizer", "schedule", "n_tokens", "batch_size", "seed")
    return {
        "model": {
            "name": lm.name,
            "revision": revision or config["lm"].get("revision"),
            "processing": "layer norms folded, writes centred" if folded else "none",
        },
        "sites": list(lm.sites),
        "tokenizer": {"name": lm.tokenizer.name_or_path, "vocab_size": len(lm.tokenizer)},
        "bos": {"id": lm.bos_id, "policy": "first in every row of seq_len tokens, and between documents"},
        **{key: config[key] for key in keys},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this checkout, marked where files differ from it; None for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None


@torch.no_grad()
def responses(sae: BaseSAE, x: Float[Tensor, "n s d"]) -> dict[str, Float[Tensor, "n _"]]:
    """Code and reconstruction of each row, by the deployed rule."""
    was_training = sae.training
    x_hat, code = sae.eval().autoencode(x.to(next(sae.parameters())))
    sae.train(was_training)
    return {"code": code.to_dense() if isinstance(code, SparseCode) else code, "x_hat": x_hat.flatten(1)}


def probe(sae: BaseSAE, x: Float[Tensor, "n s d"]) -> bytes:
    """A safetensors file of a few rows with what the SAE makes of them; the codes as (row, latent) and value."""
    found = {name: t.cpu() for name, t in responses(sae, x).items()}
    entries = found["code"].nonzero()
    values = found["code"][entries[:, 0], entries[:, 1]]
    tensors = {"x": x.cpu().float(), "x_hat": found["x_hat"], "entries": entries.int(), "values": values}
    return save({name: t.contiguous() for name, t in tensors.items()})


def check_probe(sae: BaseSAE, file: Path) -> None:
    """Recompute the probe's codes and reconstructions.

    Raises:
        UserError: more than a few rows come out otherwise than when the SAE was saved.
    """
    saved = load_file(file)
    now = responses(sae, saved["x"])
    code = torch.zeros(len(saved["x"]), sae.n_latents)
    code[saved["entries"][:, 0], saved["entries"][:, 1]] = saved["values"]
    wrong = differs(now["code"], code) | differs(now["x_hat"], saved["x_hat"])
    if wrong.float().mean() > TIES:
        raise UserError(
            f"the SAE beside {file} does not reproduce its own codes ({int(wrong.sum())} of {len(wrong)} probe rows): "
            "its files or this library have changed since it was saved, so load it with the versions in config.json."
        )


def differs(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Tensor:
    return (a - b).norm(dim=1) > TOLERANCE * b.norm(dim=1) + 1e-6
