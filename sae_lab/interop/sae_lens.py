"""Read the SAEs of SAELens, of version 6 and before, and write version 6: cfg.json and sae_weights.safetensors."""

import logging
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.interop.slices import Read, write_slices
from sae_lab.interop.tensors import (
    ONE_TO_ONE,
    TRANSCODERS,
    Tensors,
    add_input_bias,
    build,
    check_exportable,
    fold_decoder_norm,
    fold_scale,
    read_json,
    read_safetensors,
    require,
    single_source_tensors,
    take_thresholds,
)
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
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
    "transcoder": "VanillaSAE",
    "skip_transcoder": "VanillaSAE",
    "jumprelu_transcoder": "JumpReLUSAE",
    "jumprelu_skip_transcoder": "JumpReLUSAE",
}
ARCHITECTURES = {
    "VanillaSAE": "standard",
    "GatedSAE": "gated",
    "JumpReLUSAE": "jumprelu",
    "TopKSAE": "topk",
    "MatryoshkaTopKSAE": "topk",
    "BatchTopKSAE": "jumprelu",  # at inference, a batch-wise rule is a threshold
    "MatryoshkaSAE": "jumprelu",
}
NORMALIZE = {"none": "none", "layer_norm": "per_token", "constant_norm_rescale": "constant_norm"}
NORMALIZED = {ours: theirs for theirs, ours in NORMALIZE.items()}
VERSION = "6.54.12"
"""Version of SAELens that `write` follows and is tested against."""
RESIDUAL = re.compile(r"(?:transformer\.h|model\.layers|gpt_neox\.layers)\.(\d+)")
"""Paths of the modules that TransformerLens calls blocks.<i>.hook_resid_post."""
SCALED = "expected_average_only_in"
"""Value of normalize_activations for inputs multiplied by one factor, `scaling_factor`."""
AXES = {"W_enc": 1, **dict.fromkeys(("W_dec", "b_enc", "b_gate", "r_mag", "b_mag", "threshold"), 0)}
"""Tensors of sae_weights.safetensors with an axis of latents, and that axis."""
SCALER = "activation_scaler.json"
"""File in which a training run of SAELens stores that factor."""


def read(folder: Path, overrides: Mapping[str, Any] | None = None, scale: float | None = None) -> BaseSAE:
    """Read a SAELens folder; the codes are those that SAELens computes.

    For `hook_z`, SAELens joins the attention heads itself. Here rows must be joined already: (b, n_heads · d_head).

    Args:
        folder: folder with cfg.json and sae_weights.safetensors.
        overrides: values that replace those of cfg.json, as in the release table.
        scale: factor by which inputs are multiplied if normalize_activations is expected_average_only_in; None reads
            it from activation_scaler.json.

    Raises:
        UserError: the errors of Tensors; an architecture, activation or normalization without an exact counterpart
            here; an unknown `scale`.
    """
    file = folder / CONFIG
    config = upgrade_config(read_json(file) | dict(overrides or {}))
    name = sae_class(config, file)
    normalize = config.get("normalize_activations") or "none"
    if normalize == SCALED:
        scale = read_scale(folder) if scale is None else scale
    elif normalize not in (("none",) if is_transcoder(config) else NORMALIZE):
        raise UserError(f"{file} has normalize_activations={normalize!r}, which has no exact counterpart here.")
    sae = read_weights(folder / WEIGHTS, config, name, NORMALIZE.get(normalize, "none"))
    if normalize == SCALED and scale is not None:
        fold_scale(sae, 1 / scale, 1 / scale)  # for a transcoder too, SAELens has one factor for input and output
    if config.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norm(sae)
    if not config.get("apply_b_dec_to_input", True):
        add_input_bias(sae)
    warn_if_processed(config, folder)
    return sae


def warn_if_processed(config: Mapping[str, Any], folder: Path) -> None:
    """Log a warning if the SAE was trained on a model with folded layer norms or centered writes."""
    metadata = config.get("metadata") or {}
    arguments = config.get("model_from_pretrained_kwargs") or metadata.get("model_from_pretrained_kwargs") or {}
    processed = [name for name in ("fold_ln", "center_writing_weights") if arguments.get(name)]
    if processed:
        log.warning(
            "%s was trained on a model with %s: use activations of lm=transformer_lens lm.compatibility_mode=true",
            folder,
            " and ".join(processed),
        )


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of any SAELens version with the keys of version 6."""
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
    """Return the name of our class for the config's architecture; raise a UserError if there is none."""
    architecture = require(config, "architecture", file)
    if architecture not in CLASSES:
        raise UserError(f"{file} has the architecture {architecture!r}: it must be one of {', '.join(CLASSES)}.")
    check_sites(config, file)
    activation = config.get("activation_fn", "relu")
    if activation != "relu":
        raise UserError(f"{file} has the activation {activation!r}: it must be relu or topk.")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise UserError(
            f"{file} has reshape_activations={config['reshape_activations']!r}: it must be 'none' or 'hook_z'."
        )
    return CLASSES[architecture]


def is_transcoder(config: Mapping[str, Any]) -> bool:
    return config["architecture"].endswith("transcoder")


def check_sites(config: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError unless this is an SAE of one site, or a transcoder between two sites of the same width."""
    if not is_transcoder(config):
        entries = {**config, **(config.get("metadata") or {})}
        if entries.get("hook_name_out") or entries.get("d_out"):
            known = ", ".join(name for name in CLASSES if name.endswith("transcoder"))
            raise UserError(
                f"{file} describes a transcoder of architecture {config['architecture']!r}: it must be one of {known}."
            )
        return
    d_in, d_out = require(config, "d_in", file), require(config, "d_out", file)
    if d_in != d_out:
        raise UserError(
            f"{file} predicts width {d_out} from width {d_in}: the sites of a transcoder must have the same width."
        )
    if config.get("apply_b_dec_to_input", True):  # true is SAELens' default, with which it does not load a transcoder
        raise UserError(
            f"{file} does not set apply_b_dec_to_input=false: b_dec belongs to the predicted site, so it cannot be "
            "subtracted from the input."
        )


def read_scale(folder: Path) -> float:
    """Read the factor by which inputs are multiplied from activation_scaler.json."""
    file = folder / SCALER
    if not file.is_file():
        raise UserError(
            f"{folder} has normalize_activations={SCALED}, but not the factor of its inputs: load the SAE by its "
            "release, or write "
            f'{{"scaling_factor": ...}} to {SCALER} in this folder.'
        )
    return float(require(read_json(file), "scaling_factor", file))


def read_weights(file: Path, config: Mapping[str, Any], name: str, normalize: str) -> BaseSAE:
    """Build the SAE of class `name` from sae_weights.safetensors."""
    d, f = require(config, "d_in", CONFIG), require(config, "d_sae", CONFIG)
    arguments: dict[str, Any] = {"normalize": normalize}
    if is_transcoder(config):
        arguments |= {**ONE_TO_ONE, "skip": "skip" in config["architecture"]}
    with Tensors(file, read_safetensors(file)) as t:
        ours = {"W_enc": t.take("W_enc", d, f).T, "W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        ours["b_enc"] = t.take("b_gate" if name == "GatedSAE" else "b_enc", f)
        if name == "GatedSAE":
            ours |= {key: t.take(key, f) for key in ("r_mag", "b_mag")}
        elif name == "JumpReLUSAE":  # relu(h) · 1[h > threshold]: a negative threshold has the same effect as 0
            ours["thresholds"] = t.take("threshold", f).clamp_min(0)
            arguments["penalty"] = "l0"
        elif name != "VanillaSAE":
            arguments["k"] = require(config, "k", CONFIG)
        if name in ("BatchTopKSAE", "MatryoshkaSAE"):
            ours["threshold"] = t.take("topk_threshold")
        if name == "MatryoshkaSAE":
            widths = [0, *require(config, "matryoshka_widths", CONFIG)]
            arguments["group_sizes"] = [b - a for a, b in pairwise(widths)]
        if arguments.get("skip"):
            ours["W_skip"] = t.take("W_skip", d, d)
        if "scaling_factor" in t.left and bool((t.left["scaling_factor"] == 1).all()):
            t.drop("scaling_factor")
    return build(name, ours, **arguments)


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any], read: Read | None = None) -> None:
    """Write a folder that SAELens loads; there the SAE computes the codes that `sae` computes in eval mode.

    Args:
        sae: the SAE, or its first slice.
        read: reads another slice.

    Raises:
        UserError: SAELens cannot represent the SAE.
    """

    def represented(sae: BaseSAE) -> BaseSAE:
        return check_exportable(sae, ARCHITECTURES, NORMALIZED, "SAELens", TRANSCODERS["sae_lens"])

    sae = represented(sae)
    write_slices(folder / WEIGHTS, weight_tensors, AXES, sae, read and (lambda own: represented(read(own))))
    write_json(folder / CONFIG, config_for(sae, provenance))


def architecture_of(sae: BaseSAE) -> str:
    """Return SAELens' name for the architecture of an SAE or transcoder."""
    architecture = ARCHITECTURES[type(sae).__name__]
    if not sae.n_inputs:
        return architecture
    kind = "skip_transcoder" if sae.config["skip"] else "transcoder"
    return kind if architecture == "standard" else f"{architecture}_{kind}"


def weight_tensors(sae: BaseSAE) -> dict[str, Tensor]:
    """Return the content of sae_weights.safetensors."""
    architecture, d, f = ARCHITECTURES[type(sae).__name__], sae.d_in, len(sae.own_latents)
    with single_source_tensors(sae) as t:
        theirs = {"W_enc": t.take("W_enc", f, d).T, "W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        theirs["b_gate" if architecture == "gated" else "b_enc"] = t.take("b_enc", f)
        if architecture == "gated":
            theirs |= {name: t.take(name, f) for name in ("r_mag", "b_mag")}
        if architecture == "jumprelu":
            theirs["threshold"] = take_thresholds(t, f)
        if sae.config["skip"]:
            theirs["W_skip"] = t.take("W_skip", d, d)
    return theirs


def config_for(sae: BaseSAE, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of cfg.json."""
    config = {
        "architecture": architecture_of(sae),
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not sae.n_inputs,
        "normalize_activations": NORMALIZED[sae.config["normalize"]],
        "reshape_activations": "none",
        "metadata": metadata(provenance) | {"sae_lab_class": type(sae).__name__, "sae_lab_k": sae.config.get("k")},
    }
    if sae.n_inputs:
        config["d_out"] = sae.d_in
    if config["architecture"] == "topk":
        config |= {"k": sae.config["k"], "rescale_acts_by_decoder_norm": False}
    return config


def metadata(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return SAELens' metadata about the activations; None where the provenance has no value."""
    data = provenance.get("data", {})
    read, *predicted = provenance.get("sites") or [None]
    processed = provenance.get("model", {}).get("processing", "none") != "none"
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": provenance.get("model", {}).get("name"),
        "model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": True} if processed else {},
        **hook_names(read),
        **(hook_names(predicted[0], "_out") if predicted else {}),
        "hook_head_index": None,
        "context_size": data.get("seq_len"),
        "prepend_bos": True if provenance.get("bos") else None,
        "exclude_special_tokens": data.get("exclude_bos"),
        "seqpos_slice": [data["exclude_first"], None] if data.get("exclude_first") else [None],
        "dataset_path": data.get("path") or data.get("paths") or data.get("_target_"),
        "sae_lab_commit": provenance.get("commit"),
    }


def hook_names(site: str | None, suffix: str = "") -> dict[str, str | None]:
    """Return a site's TransformerLens name, and its Hugging Face path if both are known."""
    residual = RESIDUAL.fullmatch(site or "")
    name = f"blocks.{residual[1]}.hook_resid_post" if residual else site
    return {f"hook_name{suffix}": name, f"hf_hook_name{suffix}": site if residual else None}
