"""Read Llama Scope: hyperparams.json and checkpoints/final.safetensors, and the later llama_scope_r1 files."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.interop.tensors import (
    ONE_TO_ONE,
    Tensors,
    add_input_bias,
    build,
    fold_scale,
    read_json,
    read_safetensors,
    require,
)
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

FILES = CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NORMS = "dataset_average_activation_norm"
ACTIVATIONS = ("jumprelu", "topk")
"""Both are deployed as JumpReLU with one threshold: the SAEs were trained with TopK and converted."""


def read(folder: Path) -> BaseSAE:
    """Read a Llama Scope folder as a JumpReLU SAE or transcoder.

        s    = sqrt(d) / dataset_average_activation_norm
        h    = s x W_encᵀ + b_enc
        code = h · 1[h > s · jump_relu_threshold]
        x̂    = (code W_decᵀ + b_dec) / s            s of the predicted site

    The threshold and the codes are those of SAELens. He, Shu et al. 2024, arXiv 2410.20526.

    Raises:
        UserError: the errors of Tensors; a setting without a counterpart here.
    """
    file = folder / CONFIG
    config = read_json(file)
    check(config, file)
    norms = require(config, NORMS, file)
    d = require(config, "d_model", file)
    scales = [math.sqrt(d) / float(require(norms, name, file)) for name in ("in", "out")]
    with Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS)) as t:
        ours = take_weights(t)
        threshold = scales[0] * float(require(config, "jump_relu_threshold", file))
        ours["thresholds"] = torch.full_like(ours["b_enc"], threshold)
    return jump_relu(ours, scales[0], scales[1], config.get("hook_point_in") != config.get("hook_point_out"))


def check(config: dict[str, Any], file: Path) -> None:
    """Raise a UserError for a setting that has no counterpart here."""
    if config.get("act_fn", "jumprelu").lower() not in ACTIVATIONS:
        raise UserError(f"{file} has act_fn={config['act_fn']!r}: it must be one of {', '.join(ACTIVATIONS)}.")
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        raise UserError(f"{file} has norm_activation={config['norm_activation']!r}: it must be 'dataset-wise'.")
    for name in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if config.get(name):
            raise UserError(f"{file} has {name}=true, which has no counterpart here.")


def take_weights(t: Tensors) -> dict[str, Tensor]:
    """Take two nn.Linear with biases: the encoder (f, d) and the decoder (d, f)."""
    W_enc = t.take("encoder.weight", None, None)
    f, d = W_enc.shape
    ours = {"W_enc": W_enc, "b_enc": t.take("encoder.bias", f), "W_dec": t.take("decoder.weight", d, f).T}
    return ours | {"b_dec": t.take("decoder.bias", d)}


def jump_relu(ours: dict[str, Tensor], read: float, written: float, transcoder: bool) -> BaseSAE:
    """Build an SAE that reads `read` · x and returns `written` · x_hat, and fold both factors into its weights."""
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none", **(ONE_TO_ONE if transcoder else {}))
    add_input_bias(sae)
    fold_scale(sae, 1 / read, 1 / written)
    return sae
