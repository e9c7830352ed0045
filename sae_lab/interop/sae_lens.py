"""SAELens: cfg.json and sae_weights.safetensors, of version 6 and of those before it."""

import logging
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from sae_lab.checkpoint import write_json
from sae_lab.errors import UserError
from sae_lab.interop.tensors import (
    Tensors,
    add_input_bias,
    build,
    exportable,
    fold_decoder_norm,
    fold_scale,
    need,
    parts,
    read_json,
    read_safetensors,
    write_safetensors,
)
from sae_lab.saes.base import BaseSAE

log = logging.getLogger(__name__)

FILES = CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

CLASSES = {
    "standard": "VanillaSAE",
    "gated": "GatedSAE",
    "jumprelu": "JumpReLUSAE",
    "topk": "TopKSAE",
    "batchtopk": "BatchTopKSAE",
    "matryoshka_batchtopk": "MatryoshkaSAE",
}
ARCHITECTURES = {
    "VanillaSAE": "standard",
    "GatedSAE": "gated",
    "JumpReLUSAE": "jumprelu",
    "TopKSAE": "topk",
    "MatryoshkaTopKSAE": "topk",
    "BatchTopKSAE": "jumprelu",  # deployed, a batch-wise rule is a threshold
    "MatryoshkaSAE": "jumprelu",
}
NORMALIZE = {"none": "none", "layer_norm": "per_token", "constant_norm_rescale": "constant_norm"}
NORMALIZED = {ours: theirs for theirs, ours in NORMALIZE.items()}
VERSION = "6.54.12"
"""Of the library whose format `write` follows and that it is checked against."""
RESIDUAL = re.compile(r"(?:transformer\.h|model\.layers|gpt_neox\.layers)\.(\d+)")
"""The modules whose output TransformerLens calls blocks.<i>.hook_resid_post."""
SCALED = "expected_average_only_in"
SCALER = "activation_scaler.json"
"""Where a training run keeps the factor of its inputs."""


def read(folder: Path, overrides: Mapping[str, Any] | None = None, scale: float | None = None) -> BaseSAE:
    """The SAE of a SAELens folder, with the codes that SAELens computes.

    Heads that SAELens joins (`hook_z`) are expected joined here: rows are (b, n_heads · d_head).

    Args:
        overrides: of cfg.json, as a release table may have them.
        scale: what inputs are multiplied by where they are trained with normalize_activations
            expected_average_only_in; the run's activation_scaler.json, where there is one.

    Raises:
        UserError: what Tensors raises, an architecture, activation or normalisation that has no exact counterpart
            here, or such an input factor that nobody gives.
    """
    file = folder / CONFIG
    config = modern(read_json(file) | dict(overrides or {}))
    name = sae_class(config, file)
    normalize = config.get("normalize_activations") or "none"
    if normalize == SCALED:
        scale = read_scale(folder) if scale is None else scale
    elif normalize not in NORMALIZE:
        raise UserError(f"{file} says normalize_activations={normalize!r}, which has no exact counterpart here.")
    sae = read_weights(folder / WEIGHTS, config, name, NORMALIZE.get(normalize, "none"))
    if normalize == SCALED and scale is not None:
        fold_scale(sae, scale)
    if config.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norm(sae)
    if not config.get("apply_b_dec_to_input", True):
        add_input_bias(sae)
    warn_of_processing(config, folder)
    return sae


def warn_of_processing(config: Mapping[str, Any], folder: Path) -> None:
    """Say so where the model that gave the activations was processed, which makes them others than the plain one's."""
    metadata = config.get("metadata") or {}
    arguments = config.get("model_from_pretrained_kwargs") or metadata.get("model_from_pretrained_kwargs") or {}
    processed = [name for name in ("fold_ln", "center_writing_weights") if arguments.get(name)]
    if processed:
        log.warning(
            "%s is an SAE of a model with %s: take its activations with lm=transformer_lens lm.compatibility_mode=true",
            folder,
            " and ".join(processed),
        )


def modern(config: dict[str, Any]) -> dict[str, Any]:
    """A config of any version in the terms of version 6."""
    version = config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version") or "0"
    if int(str(version).split(".")[0]) >= 6:
        return config
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    arguments = config.get("activation_fn_kwargs") or {}
    config = {"architecture": "standard", **config, "activation_fn": activation}
    if activation == "topk":
        config |= {"architecture": "topk", "k": arguments.get("k"), "activation_fn": "relu"}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = SCALED if config["normalize_activations"] else "none"
    return config


def sae_class(config: Mapping[str, Any], file: Path) -> str:
    architecture = need(config, "architecture", file)
    metadata = config.get("metadata") or {}
    if "transcoder" in architecture or metadata.get("hook_name_out") or config.get("d_out"):
        raise UserError(f"{file} describes a transcoder, which reads one site and writes another: no SAE here does.")
    if architecture not in CLASSES:
        raise UserError(f"{file} has the architecture {architecture!r}: known here are {', '.join(CLASSES)}.")
    activation = config.get("activation_fn", "relu")
    if activation != "relu":
        raise UserError(f"{file} has the activation {activation!r}: known here are relu and topk.")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise UserError(f"{file} says reshape_activations={config['reshape_activations']!r}, which is unknown.")
    return CLASSES[architecture]


def read_scale(folder: Path) -> float:
    file = folder / SCALER
    if not file.is_file():
        raise UserError(
            f"{folder} wants its inputs multiplied by a factor ({SCALED}) that it does not hold: load it by its "
            "release, for whose table `pip install --no-deps sae-lens` does, or put "
            f'{{"scaling_factor": ...}} into {SCALER} there.'
        )
    return float(need(read_json(file), "scaling_factor", file))


def read_weights(file: Path, config: Mapping[str, Any], name: str, normalize: str) -> BaseSAE:
    d, f = need(config, "d_in", CONFIG), need(config, "d_sae", CONFIG)
    arguments: dict[str, Any] = {"normalize": normalize}
    with Tensors(file, read_safetensors(file)) as t:
        ours = {"W_enc": t.take("W_enc", d, f).T, "W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        ours["b_enc"] = t.take("b_gate" if name == "GatedSAE" else "b_enc", f)
        if name == "GatedSAE":
            ours |= {key: t.take(key, f) for key in ("r_mag", "b_mag")}
        elif name == "JumpReLUSAE":  # relu(h) · 1[h > threshold]: a threshold below zero is zero
            ours["thresholds"] = t.take("threshold", f).clamp_min(0)
            arguments["penalty"] = "l0"
        elif name != "VanillaSAE":
            arguments["k"] = need(config, "k", CONFIG)
        if name in ("BatchTopKSAE", "MatryoshkaSAE"):
            ours["threshold"] = t.take("topk_threshold")
        if name == "MatryoshkaSAE":
            widths = [0, *need(config, "matryoshka_widths", CONFIG)]
            arguments["group_sizes"] = [b - a for a, b in pairwise(widths)]
        if "scaling_factor" in t.left and bool((t.left["scaling_factor"] == 1).all()):
            t.drop("scaling_factor")
    return build(name, ours, **arguments)


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any]) -> None:
    """A folder that SAELens loads, computing the codes that `sae` computes in eval mode.

    Raises:
        UserError: SAELens has no form for it.
    """
    sae = exportable(sae, ARCHITECTURES, NORMALIZED, "SAELens")
    architecture, d, f = ARCHITECTURES[type(sae).__name__], sae.d_in, sae.n_latents
    with parts(sae) as t:
        theirs = {"W_enc": t.take("W_enc", f, d).T, "W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        theirs["b_gate" if architecture == "gated" else "b_enc"] = t.take("b_enc", f)
        if architecture == "gated":
            theirs |= {name: t.take(name, f) for name in ("r_mag", "b_mag")}
        if architecture == "jumprelu":
            theirs["threshold"] = t.take("thresholds", f) if "thresholds" in t.left else t.take("threshold").expand(f)
    config = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": f,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": NORMALIZED[sae.config["normalize"]],
        "reshape_activations": "none",
        "metadata": metadata(provenance) | {"sae_lab_class": type(sae).__name__, "sae_lab_k": sae.config.get("k")},
    }
    if architecture == "topk":
        config |= {"k": sae.config["k"], "rescale_acts_by_decoder_norm": False}
    write_safetensors(folder / WEIGHTS, theirs)
    write_json(folder / CONFIG, config)


def metadata(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens wants to know of the activations, in its words; None where the provenance does not say."""
    data = provenance.get("data", {})
    site = next(iter(provenance.get("sites", [])), None)
    residual = RESIDUAL.fullmatch(site or "")
    processed = provenance.get("model", {}).get("processing", "none") != "none"
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": provenance.get("model", {}).get("name"),
        "model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": True} if processed else {},
        "hook_name": f"blocks.{residual[1]}.hook_resid_post" if residual else site,
        "hf_hook_name": site if residual else None,
        "hook_head_index": None,
        "context_size": data.get("seq_len"),
        "prepend_bos": True if provenance else None,
        "exclude_special_tokens": data.get("exclude_bos"),
        "seqpos_slice": [data["exclude_first"], None] if data.get("exclude_first") else [None],
        "dataset_path": data.get("path") or data.get("paths") or data.get("_target_"),
        "sae_lab_commit": provenance.get("commit"),
    }
