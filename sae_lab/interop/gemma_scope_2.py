"""Read Gemma Scope 2: SAEs, transcoders, crosscoders and cross-layer transcoders in params*.safetensors."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.interop.tensors import ONE_TO_ONE, Tensors, add_input_bias, build, read_json, read_safetensors
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

FILES = (WEIGHTS,) = ("params.safetensors",)
FILES_BY_LAYER = ("params_layer_0.safetensors",)
LAYER = re.compile(r"params_layer_(\d+)\.safetensors")
CONFIG = "config.json"
SKIP = "affine_skip_connection"
KINDS = ("sae", "transcoder", "crosscoder", "clt")


def read(folder: Path) -> BaseSAE:
    """Read a folder of Gemma Scope 2; all its SAEs are JumpReLU.

        h    = x w_enc + b_enc
        code = relu(h) · 1[h > threshold]
        y    = code w_dec + b_dec [+ x affine_skip_connection]

    A crosscoder and a cross-layer transcoder have one file per layer i, whose latents read layer i and write all
    layers, w_dec (f, L, d). As a crosscoder reads the layers that it predicts, it is an SAE of L sources here.

    Raises:
        UserError: the errors of Tensors; the kind of the SAE is unknown; a cross-layer transcoder has skip connections,
            or writes to layers before the one that it reads.
    """
    kind = kind_of(folder)
    if kind in ("crosscoder", "clt"):
        return read_layers(folder, kind)
    with Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS)) as t:
        ours = take_encoder(t)
        d, f = ours["b_dec"].numel(), len(ours["W_enc"])
        ours["W_dec"] = t.take("w_dec", f, d)
        skip = SKIP in t.left
        if skip:
            ours["W_skip"] = t.take(SKIP, d, d).T
    sources = {**ONE_TO_ONE, "skip": skip} if kind == "transcoder" else {}
    if skip and not sources:
        raise UserError(f"{folder} has {SKIP}, which only a transcoder has: name the folder's kind in {CONFIG}.")
    return jump_relu(ours, **sources)


def kind_of(folder: Path) -> str:
    """Return the kind that config.json names, else the one that the path names, such as transcoder_all/..."""
    file = folder / CONFIG
    config = read_json(file) if file.is_file() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{file} has architecture={config['architecture']!r}: it must be 'jump_relu'.")
    kind = config.get("type") or next((kind for kind in reversed(KINDS) if kind in str(folder)), "sae")
    if kind not in KINDS:
        raise UserError(f"{file} has type={kind!r}: it must be one of {', '.join(KINDS)}.")
    return kind


def read_layers(folder: Path, kind: str) -> BaseSAE:
    """Read the files of all layers as one SAE; its latents are in the order of the layers."""
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := LAYER.fullmatch(path.name)))
    if numbers != list(range(len(numbers))):
        raise UserError(f"{folder} has the layers {numbers} of a {kind}: it must have all from 0 on.")
    parts = [read_layer(folder / f"params_layer_{i}.safetensors", len(numbers)) for i in numbers]
    ours = {name: torch.cat([part[name] for part in parts]) for name in ("W_enc", "b_enc", "thresholds", "W_dec")}
    ours["b_dec"] = torch.stack([part["b_dec"] for part in parts])
    n, f = len(parts), len(ours["W_enc"])
    own = torch.arange(f) // (f // n)
    if kind == "crosscoder":
        W_enc = ours["W_enc"].new_zeros(f, n, ours["W_enc"].shape[1])
        W_enc[torch.arange(f), own] = ours["W_enc"]
        return jump_relu(ours | {"W_enc": W_enc}, n_sources=n)
    if ours["W_dec"][torch.arange(n) < own.unsqueeze(1)].any():
        raise UserError(f"{folder} has latents that write to layers before their own: that has no counterpart here.")
    return build("CrossLayerJumpReLUSAE", ours, normalize="none", penalty="l0", n_sources=2 * n)


def read_layer(file: Path, n: int) -> dict[str, Tensor]:
    """Read the latents of one of n layers."""
    tensors = read_safetensors(file)
    if SKIP in tensors:
        raise UserError(f"{file} has {SKIP} per layer, which has no counterpart here: take the SAE without _affine.")
    with Tensors(file, tensors) as t:
        ours = take_encoder(t)
        return ours | {"W_dec": t.take("w_dec", len(ours["W_enc"]), n, ours["b_dec"].numel())}


def take_encoder(t: Tensors) -> dict[str, Tensor]:
    """Take all tensors of one file but w_dec."""
    W_enc = t.take("w_enc", None, None).T
    f, d = W_enc.shape
    ours = {"W_enc": W_enc, "b_enc": t.take("b_enc", f), "b_dec": t.take("b_dec", d)}
    return ours | {"thresholds": t.take("threshold", f).clamp_min(0)}


def jump_relu(ours: dict[str, Tensor], **sources: Any) -> BaseSAE:
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none", **sources)
    add_input_bias(sae)
    return sae
