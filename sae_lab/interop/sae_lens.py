"""SAELens: cfg.json and sae_weights.safetensors, of version 6 and of those before it."""

import logging
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.interop.tensors import (
    ONE_TO_ONE,
    TRANSCODERS,
    Tensors,
    add_input_bias,
    build,
    check_exportable,
    fold_decoder_norm,
    fold_scale,
    parts,
    read_json,
    read_safetensors,
    require,
    thresholds,
    write_safetensors,
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
    elif normalize not in (("none",) if is_transcoder(config) else NORMALIZE):
        raise UserError(f"{file} says normalize_activations={normalize!r}, which has no exact counterpart here.")
    sae = read_weights(folder / WEIGHTS, config, name, NORMALIZE.get(normalize, "none"))
    if normalize == SCALED and scale is not None:
        fold_scale(sae, 1 / scale, 1 / scale)  # of a transcoder too, and what it predicts, as SAELens has it
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
    architecture = require(config, "architecture", file)
    if architecture not in CLASSES:
        raise UserError(f"{file} has the architecture {architecture!r}: known here are {', '.join(CLASSES)}.")
    check_sites(config, file)
    activation = config.get("activation_fn", "relu")
    if activation != "relu":
        raise UserError(f"{file} has the activation {activation!r}: known here are relu and topk.")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise UserError(f"{file} says reshape_activations={config['reshape_activations']!r}, which is unknown.")
    return CLASSES[architecture]


def is_transcoder(config: Mapping[str, Any]) -> bool:
    return config["architecture"].endswith("transcoder")


def check_sites(config: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError unless this is an SAE of one site, or a transcoder between two of one width."""
    if not is_transcoder(config):
        said = {**config, **(config.get("metadata") or {})}
        if said.get("hook_name_out") or said.get("d_out"):
            known = ", ".join(name for name in CLASSES if name.endswith("transcoder"))
            raise UserError(
                f"{file} describes a transcoder by the architecture {config['architecture']!r}: known here are {known}."
            )
        return
    d_in, d_out = require(config, "d_in", file), require(config, "d_out", file)
    if d_in != d_out:
        raise UserError(f"{file} predicts width {d_out} from width {d_in}: here a transcoder's sites are of one width.")
    if config.get("apply_b_dec_to_input", True):  # SAELens takes true where nothing is said, and loads no such file
        raise UserError(f"{file} does not say apply_b_dec_to_input=false: a transcoder's b_dec is of another site.")


def read_scale(folder: Path) -> float:
    file = folder / SCALER
    if not file.is_file():
        raise UserError(
            f"{folder} wants its inputs multiplied by a factor ({SCALED}) that it does not hold: load it by its "
            "release, for whose table `pip install --no-deps sae-lens` does, or put "
            f'{{"scaling_factor": ...}} into {SCALER} there.'
        )
    return float(require(read_json(file), "scaling_factor", file))


def read_weights(file: Path, config: Mapping[str, Any], name: str, normalize: str) -> BaseSAE:
    d, f = require(config, "d_in", CONFIG), require(config, "d_sae", CONFIG)
    arguments: dict[str, Any] = {"normalize": normalize}
    if is_transcoder(config):
        arguments |= {**ONE_TO_ONE, "skip": "skip" in config["architecture"]}
    with Tensors(file, read_safetensors(file)) as t:
        ours = {"W_enc": t.take("W_enc", d, f).T, "W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        ours["b_enc"] = t.take("b_gate" if name == "GatedSAE" else "b_enc", f)
        if name == "GatedSAE":
            ours |= {key: t.take(key, f) for key in ("r_mag", "b_mag")}
        elif name == "JumpReLUSAE":  # relu(h) · 1[h > threshold]: a threshold below zero is zero
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


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any]) -> None:
    """A folder that SAELens loads, computing the codes that `sae` computes in eval mode.

    Raises:
        UserError: SAELens has no form for it.
    """
    sae = check_exportable(sae, ARCHITECTURES, NORMALIZED, "SAELens", TRANSCODERS["sae_lens"])
    theirs = weights(sae)  # before anything is written: it refuses what it does not know
    write_safetensors(folder / WEIGHTS, theirs)
    write_json(folder / CONFIG, description(sae, provenance))


def architecture_of(sae: BaseSAE) -> str:
    architecture = ARCHITECTURES[type(sae).__name__]
    if not sae.n_inputs:
        return architecture
    kind = "skip_transcoder" if sae.config["skip"] else "transcoder"
    return kind if architecture == "standard" else f"{architecture}_{kind}"


def weights(sae: BaseSAE) -> dict[str, Tensor]:
    """The tensors of sae_weights.safetensors."""
    architecture, d, f = ARCHITECTURES[type(sae).__name__], sae.d_in, sae.n_latents
    with parts(sae) as t:
        theirs = {"W_enc": t.take("W_enc", f, d).T, "W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        theirs["b_gate" if architecture == "gated" else "b_enc"] = t.take("b_enc", f)
        if architecture == "gated":
            theirs |= {name: t.take(name, f) for name in ("r_mag", "b_mag")}
        if architecture == "jumprelu":
            theirs["threshold"] = thresholds(t, f)
        if sae.config["skip"]:
            theirs["W_skip"] = t.take("W_skip", d, d)
    return theirs


def description(sae: BaseSAE, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json."""
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
    """What SAELens wants to know of the activations, in its words; None where the provenance does not say."""
    data = provenance.get("data", {})
    read, *predicted = provenance.get("sites") or [None]
    processed = provenance.get("model", {}).get("processing", "none") != "none"
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": provenance.get("model", {}).get("name"),
        "model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": True} if processed else {},
        **hook(read),
        **(hook(predicted[0], "_out") if predicted else {}),
        "hook_head_index": None,
        "context_size": data.get("seq_len"),
        "prepend_bos": True if provenance else None,
        "exclude_special_tokens": data.get("exclude_bos"),
        "seqpos_slice": [data["exclude_first"], None] if data.get("exclude_first") else [None],
        "dataset_path": data.get("path") or data.get("paths") or data.get("_target_"),
        "sae_lab_commit": provenance.get("commit"),
    }


def hook(site: str | None, suffix: str = "") -> dict[str, str | None]:
    """A site as TransformerLens calls it, and as Hugging Face does where we know both."""
    residual = RESIDUAL.fullmatch(site or "")
    name = f"blocks.{residual[1]}.hook_resid_post" if residual else site
    return {f"hook_name{suffix}": name, f"hf_hook_name{suffix}": site if residual else None}
