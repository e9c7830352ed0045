"""Probes: a few rows saved with the SAE's outputs, to check after loading that it still computes the same."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save
from torch import Tensor

from sae_lab.ops.sparse import SparseCode
from sae_lab.parallel.shards import gather_over_shards
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

TOLERANCE = 1e-3
"""Relative tolerance of a row. Rounding on another processor changes less than 1e-5."""


MAX_CHANGED = 1 / 8
"""Share of probe rows that may change, where rounding decides between nearly equal latents. A changed rule changes most
rows."""


@torch.no_grad()
def encode_and_reconstruct(sae: BaseSAE, x: Float[Tensor, "n s d"]) -> dict[str, Float[Tensor, "n _"]]:
    """Return the code and the reconstruction of each row, under the deployed rule."""
    was_training = sae.training
    x_hat, code = sae.eval().autoencode(x.to(next(sae.parameters())))
    sae.train(was_training)
    return {"code": code.to_dense() if isinstance(code, SparseCode) else code, "x_hat": x_hat.flatten(1)}


def make_probe(sae: BaseSAE, x: Float[Tensor, "n s d"]) -> bytes:
    """Return a safetensors file of rows x with x_hat and the code, the latter as (row, latent) entries and values.

    To be called by all ranks that hold a part of the latents.
    """
    out = {name: t.cpu() for name, t in encode_and_reconstruct(sae, x).items()}
    entries = out["code"].nonzero()
    values = out["code"][entries[:, 0], entries[:, 1]]
    entries[:, 1] += sae.own_latents.start
    entries, values = (torch.cat(parts) for parts in zip(*gather_over_shards((entries, values)), strict=True))
    tensors = {"x": x.cpu().float(), "x_hat": out["x_hat"], "entries": entries.int(), "values": values}
    return save({name: t.contiguous() for name, t in tensors.items()})


def check_probe(sae: BaseSAE, file: Path) -> None:
    """Compute the codes and reconstructions of a probe again, and compare them with the saved ones.

    Raises:
        UserError: more than MAX_CHANGED of the rows differ.
    """
    saved = load_file(file)
    now = encode_and_reconstruct(sae, saved["x"])
    code = torch.zeros(len(saved["x"]), sae.n_latents)
    code[saved["entries"][:, 0], saved["entries"][:, 1]] = saved["values"]
    code = code[:, sae.own_latents.start : sae.own_latents.stop]
    wrong = rows_differ(now["code"], code) | rows_differ(now["x_hat"], saved["x_hat"])
    wrong = torch.stack(gather_over_shards(wrong)).any(dim=0)
    if wrong.float().mean() > MAX_CHANGED:
        raise UserError(
            f"the SAE in {file.parent} does not reproduce its own codes "
            f"({int(wrong.sum())} of {len(wrong)} probe rows): "
            "its files or this library changed since it was saved, so load it with the versions in config.json."
        )


def rows_differ(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Bool[Tensor, " n"]:
    """Return which rows of a differ from those of b by more than TOLERANCE."""
    return (a - b).norm(dim=1) > TOLERANCE * b.norm(dim=1) + 1e-6
