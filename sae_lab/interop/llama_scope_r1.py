"""Read Llama Scope R1 Distill: config.json and sae_weights.safetensors of OpenMOSS' library."""

import math
from pathlib import Path

from sae_lab.interop.llama_scope import NORMS, check, jump_relu, take_weights
from sae_lab.interop.tensors import Tensors, read_json, read_safetensors, require
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

FILES = CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"


def read(folder: Path) -> BaseSAE:
    """Read a folder of OpenMOSS' library as a JumpReLU SAE or transcoder.

        s    = sqrt(d) / dataset_average_activation_norm.<hook>
        h    = s x W_encᵀ + b_enc
        code = h · 1[h > exp(log_jumprelu_threshold)]
        x̂    = (code W_decᵀ + b_dec) / s

    Raises:
        UserError: the errors of Tensors; a setting without a counterpart here.
    """
    file = folder / CONFIG
    config = read_json(file)
    check(config, file)
    d, hooks = require(config, "d_model", file), [config.get(f"hook_point_{side}") for side in ("in", "out")]
    with Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS)) as t:
        ours = take_weights(t)
        if "log_jumprelu_threshold" not in t.left:
            raise UserError(f"{folder / WEIGHTS} has no log_jumprelu_threshold: only its JumpReLU SAEs can be read.")
        ours["thresholds"] = t.take("log_jumprelu_threshold", len(ours["b_enc"])).exp()
        norms = {hook: float(t.take(f"{NORMS}.{hook}")) for hook in dict.fromkeys(hooks)}
    read, written = (math.sqrt(d) / norms[hook] for hook in hooks)
    return jump_relu(ours, read, written, hooks[0] != hooks[1])
