"""A few rows saved with what an SAE makes of them, so that loading can tell whether it still does the same."""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

TOLERANCE = 1e-3
"""Relative; another processor's rounding stays below 1e-5."""


TIES = 1 / 8
"""The share of probe rows on which rounding may decide between nearly equal latents; a changed rule shows on most."""


@torch.no_grad()
def code_and_reconstruction(sae: BaseSAE, x: Float[Tensor, "n s d"]) -> dict[str, Float[Tensor, "n _"]]:
    """Code and reconstruction of each row, by the deployed rule."""
    was_training = sae.training
    x_hat, code = sae.eval().autoencode(x.to(next(sae.parameters())))
    sae.train(was_training)
    return {"code": code.to_dense() if isinstance(code, SparseCode) else code, "x_hat": x_hat.flatten(1)}


def make_probe(sae: BaseSAE, x: Float[Tensor, "n s d"]) -> bytes:
    """A safetensors file of a few rows with what the SAE makes of them; the codes as (row, latent) and value."""
    found = {name: t.cpu() for name, t in code_and_reconstruction(sae, x).items()}
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
    now = code_and_reconstruction(sae, saved["x"])
    code = torch.zeros(len(saved["x"]), sae.n_latents)
    code[saved["entries"][:, 0], saved["entries"][:, 1]] = saved["values"]
    wrong = rows_differ(now["code"], code) | rows_differ(now["x_hat"], saved["x_hat"])
    if wrong.float().mean() > TIES:
        raise UserError(
            f"the SAE beside {file} does not reproduce its own codes ({int(wrong.sum())} of {len(wrong)} probe rows): "
            "its files or this library have changed since it was saved, so load it with the versions in config.json."
        )


def rows_differ(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Tensor:
    return (a - b).norm(dim=1) > TOLERANCE * b.norm(dim=1) + 1e-6
