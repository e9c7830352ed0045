"""Read the crosscoders of dictionary_learning's forks: CrossCoder and BatchTopKCrossCoder."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.interop.tensors import Tensors, add_input_bias, build, read_json
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""What h is multiplied by before it is compared with the threshold; the file has their numbers, from 1 on."""


def read(file: Path, tensors: dict[str, Any]) -> BaseSAE:
    """Read a crosscoder of L sources: Vanilla, or for BatchTopK, with its threshold, JumpReLU.

        h    = relu(sum_l x_l W_enc_l + b_enc)              encoder.weight (L, d, f)
        code = h,   or   h · 1[h n > threshold]             n of the next line; BatchTopKCrossCoder
        n_i  = sum_l |W_dec_l,i| (CROSSCODER),   |W_dec_i| of all l (SAE),   1 (NONE)
        x̂_l  = code W_dec_l + b_dec_l                       decoder.weight (L, f, d)

    Raises:
        UserError: the errors of Tensors; the codes differ by source (DECOUPLED) or are normalized by settings that
            the file does not hold (MIXED); a BatchTopKCrossCoder has no threshold.
    """
    with Tensors(file, tensors) as t:
        W_enc = t.take("encoder.weight", None, None, None)
        s, d, f = W_enc.shape
        ours = {"W_enc": W_enc.permute(2, 0, 1), "b_enc": t.take("encoder.bias", f)}
        ours |= {"W_dec": t.take("decoder.weight", s, f, d).transpose(0, 1), "b_dec": t.take("decoder.bias", s, d)}
        threshold = t.take("threshold") if "threshold" in t.left else None
        number = int(t.take("code_normalization_id")) if "code_normalization_id" in t.left else None
        t.drop("k")
    name, arguments = "VanillaSAE", {}
    if threshold is not None:
        ours["thresholds"] = thresholds(file, threshold, ours["W_dec"], normalization(file, number))
        name, arguments = "JumpReLUSAE", {"penalty": "l0"}
    sae = build(name, ours, normalize="none", n_sources=s, **arguments)
    add_input_bias(sae)
    return sae


def normalization(file: Path, number: int | None) -> str:
    """Return the name of the code's normalization, from the file or from config.json beside it."""
    if number is not None:
        return NORMALIZATIONS[number - 1]
    config = file.parent / "config.json"
    return str((read_json(config) if config.is_file() else {}).get("code_normalization", "CROSSCODER")).upper()


def thresholds(file: Path, threshold: Tensor, W_dec: Float[Tensor, "f s d"], kind: str) -> Float[Tensor, " f"]:
    """Return the threshold of each latent; a latent that writes nothing never exceeds its own."""
    norms = {
        "CROSSCODER": W_dec.norm(dim=2).sum(1),
        "SAE": W_dec.flatten(1).norm(dim=1),
        "NONE": torch.ones(len(W_dec)),
    }
    if kind not in norms:
        raise UserError(
            f"{file} has code_normalization={kind}, which has no counterpart here: it must be {', '.join(norms)}."
        )
    if threshold < 0:
        raise UserError(
            f"{file} is a BatchTopKCrossCoder without a threshold (it is {float(threshold)}): train it further."
        )
    return (threshold / norms[kind]).clamp_max(torch.finfo(torch.float32).max)
