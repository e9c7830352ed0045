"""Read the SAEs of the BatchTopK repository: config.json and sae.pt."""

import logging
from pathlib import Path
from typing import Any

from sae_lab.interop.tensors import Tensors, build, read_json, read_pickle, require
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

log = logging.getLogger(__name__)

FILES = CONFIG, WEIGHTS = "config.json", "sae.pt"
CLASSES = {"vanilla": "VanillaSAE", "topk": "TopKSAE", "batchtopk": "BatchTopKSAE", "jumprelu": "JumpReLUSAE"}
LOG_THRESHOLD = "jumprelu.log_threshold"


def read(folder: Path) -> BaseSAE:
    """Read a checkpoint of the BatchTopK repository.

        h = (x - b_dec) W_enc + b_enc          x with mean 0 and std 1 if input_unit_norm

    The file of a BatchTopK SAE has no threshold. In train mode it selects over the batch, as there; in eval mode it
    needs `sae.calibrate(x, i)` on a few batches i = 0, 1, ... first.

    Raises:
        UserError: the errors of Tensors; an activation or a kind of SAE without a counterpart here.
    """
    file = folder / CONFIG
    config = read_json(file)
    kind = require(config, "sae_type", file)
    if kind not in CLASSES:
        raise UserError(f"{file} has sae_type={kind!r}: it must be one of {', '.join(CLASSES)}.")
    if config.get("activation", "relu") != "relu":
        raise UserError(f"{file} has activation={config['activation']!r}: it must be 'relu'.")
    arguments: dict[str, Any] = {"normalize": "per_token" if config.get("input_unit_norm") else "none"}
    if "topk" in kind:
        arguments["k"] = require(config, "top_k", file)
    with Tensors(folder / WEIGHTS, read_pickle(folder / WEIGHTS)) as t:
        W_dec = t.take("W_dec", None, None)
        f, d = W_dec.shape
        ours = {"W_enc": t.take("W_enc", d, f).T, "b_enc": t.take("b_enc", f), "b_dec": t.take("b_dec", d)}
        ours["W_dec"] = ours["W_enc"] if config.get("tied_weights") else W_dec
        if "topk" in kind and not config.get("use_encoder_bias", True):
            ours["b_enc"] = ours["b_enc"] * 0
        if kind == "jumprelu":
            ours["thresholds"] = t.take(LOG_THRESHOLD, f).exp()
            arguments["penalty"] = "l0"
    if kind == "batchtopk":
        log.warning("%s has no threshold: call sae.calibrate(x, i) on a few batches before eval mode.", folder)
    return build(CLASSES[kind], ours, **arguments)
