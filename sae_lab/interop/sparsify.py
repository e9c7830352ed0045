"""Read and write the SAEs of EleutherAI's sparsify: cfg.json and sae.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.interop.slices import Read, write_slices
from sae_lab.interop.tensors import (
    ONE_TO_ONE,
    TRANSCODERS,
    Tensors,
    build,
    check_exportable,
    has_unit_rows,
    read_json,
    read_safetensors,
    require,
    single_source_tensors,
)
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.saes.base import BaseSAE

FILES = CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
AXES = dict.fromkeys(("encoder.weight", "encoder.bias", "W_dec"), 0)
"""Tensors of sae.safetensors with an axis of latents, and that axis."""


def read(folder: Path) -> BaseSAE:
    """Read a sparsify folder as a TopKSAE.

        h = (x - b_dec) W_encᵀ + b_enc     SAE
        h = x W_encᵀ + b_enc               transcoder, with or without W_skip

    All tensors have the shapes that they have here, without the axis s. `signed` was a setting of earlier versions: the
    k entries of largest |h|, with their sign.

    Raises:
        UserError: the errors of Tensors; an SAE with a skip connection; an activation other than topk.
    """
    file = folder / CONFIG
    config = read_json(file)
    transcode, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    if skip and not transcode:
        raise UserError(f"{file} has skip_connection without transcode: only transcoders may have a skip connection.")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{file} has the activation {activation!r}: it must be 'topk'.")
    d, k = require(config, "d_in", file), require(config, "k", file)
    f = config.get("num_latents") or d * require(config, "expansion_factor", file)
    with Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS)) as t:
        ours = {"W_enc": t.take("encoder.weight", f, d), "b_enc": t.take("encoder.bias", f)}
        ours |= {"W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        if skip:
            ours["W_skip"] = t.take("W_skip", d, d)
    sources = {**ONE_TO_ONE, "skip": skip} if transcode else {}
    signed = bool(config.get("signed"))
    return build("TopKSAE", ours, k=k, normalize="none", signed=signed, **sources)


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any], read: Read | None = None) -> None:
    """Write a TopK SAE or transcoder to a folder that sparsify loads.

    Args:
        sae: the SAE, or its first slice.
        read: reads another slice.

    Raises:
        UserError: sparsify cannot represent the SAE.
    """
    unit_rows = []

    def represented(sae: BaseSAE) -> BaseSAE:
        sae = check_exportable(sae, ("TopKSAE", "MatryoshkaTopKSAE"), ("none",), "sparsify", TRANSCODERS["sparsify"])
        unit_rows.append(has_unit_rows(sae))
        return sae

    sae = represented(sae)
    write_slices(folder / WEIGHTS, weight_tensors, AXES, sae, read and (lambda own: represented(read(own))))
    config = {"activation": "topk", "d_in": sae.d_in, "num_latents": sae.n_latents, "k": sae.config["k"]}
    config |= {"normalize_decoder": all(unit_rows), "transcode": bool(sae.n_inputs)}
    config["skip_connection"] = sae.config["skip"]
    write_json(folder / CONFIG, config)


def weight_tensors(sae: BaseSAE) -> dict[str, Tensor]:
    """Return the content of sae.safetensors."""
    d, f = sae.d_in, len(sae.own_latents)
    with single_source_tensors(sae) as t:
        theirs = {"encoder.weight": t.take("W_enc", f, d), "encoder.bias": t.take("b_enc", f)}
        theirs |= {"W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        if sae.config["skip"]:
            theirs["W_skip"] = t.take("W_skip", d, d)
    return theirs
