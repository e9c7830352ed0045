"""Read and write circuit-tracer's transcoders, from which it builds attribution graphs.

A cross-layer transcoder is W_enc_<layer>.safetensors and W_dec_<layer>.safetensors. Single-layer transcoders are
layer_<layer>.safetensors. In the same folder, config.yaml holds the type of transcoder and the TransformerLens hooks.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sae_lab.interop.tensors import (
    ONE_TO_ONE,
    TRANSCODERS,
    Tensors,
    build,
    check_exportable,
    inference_tensors,
    read_safetensors,
    single_source_tensors,
    take_thresholds,
    write_safetensors,
)
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.cross_layer import CrossLayer

log = logging.getLogger(__name__)

FILES = ("W_enc_0.safetensors",)
CONFIG = "config.yaml"
ENCODER, DECODER, LAYER = "W_enc_{}.safetensors", "W_dec_{}.safetensors", "layer_{}.safetensors"
ONE_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")
THRESHOLD = "activation_function.threshold"
SITE = re.compile(r"blocks\.(\d+)\.(.+)")


def read(path: Path, tensors: dict[str, Any] | None = None) -> BaseSAE:
    """Read a folder as a cross-layer transcoder, or the file of one layer as a transcoder.

    Args:
        path: the folder or file.
        tensors: those of a single-layer transcoder's file.

    Raises:
        UserError: the errors of Tensors.
    """
    if match := ONE_ENCODER.fullmatch(path.name):
        return read_summed(path.parent, int(match[1]))
    return read_cross_layer(path) if tensors is None else read_layer(path, tensors)


def decoder_of(path: str) -> list[str]:
    """Return the decoder's file that an encoder of a cross-layer transcoder cannot be read without."""
    match = ONE_ENCODER.fullmatch(path)
    return [DECODER.format(match[1])] if match else []


def read_summed(folder: Path, i: int) -> BaseSAE:
    """Read the latents of layer i of a cross-layer transcoder as a transcoder that writes the sum over all layers.

    Its codes are exact. Its x_hat is what the latents write in total, plus b_dec of layer i, as in SAELens.
    """
    log.warning(
        "%s is layer %d of a cross-layer transcoder: its codes are exact, and x_hat is the sum of what its latents "
        "write to all layers. Give the folder or repository alone to load all layers.", folder, i,
    )  # fmt: skip
    ours = read_encoder_and_decoder(folder, i, None)
    ours |= {"W_dec": ours["W_dec"].sum(dim=1), "b_dec": ours["b_dec"][0]}
    if "thresholds" not in ours:
        return build("VanillaSAE", ours, normalize="none", **ONE_TO_ONE)
    return build("JumpReLUSAE", ours, normalize="none", penalty="l0", **ONE_TO_ONE)


def read_layer(file: Path, tensors: dict[str, Any]) -> BaseSAE:
    """Read a single-layer transcoder: JumpReLU if the file has thresholds, else ReLU.

    h = x W_encᵀ + b_enc
    y_hat = code W_dec + b_dec [+ x W_skipᵀ]
    """
    with Tensors(file, tensors) as t:
        W_enc = t.take("W_enc", None, None)
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "b_enc": t.take("b_enc", f)}
        ours |= {"W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        skip = "W_skip" in t.left
        if skip:
            ours["W_skip"] = t.take("W_skip", d, d)
        if THRESHOLD not in t.left:
            return build("VanillaSAE", ours, normalize="none", skip=skip, **ONE_TO_ONE)
        ours["thresholds"] = t.take(THRESHOLD, f)
    return build("JumpReLUSAE", ours, normalize="none", penalty="l0", skip=skip, **ONE_TO_ONE)


def read_cross_layer(folder: Path) -> BaseSAE:
    """Read a cross-layer transcoder; its latents are in the order of the layers. Missing thresholds are 0 (ReLU)."""
    n = len(list(folder.glob(ENCODER.format("*"))))
    layers = [read_encoder_and_decoder(folder, 0, n)]
    layers += [read_encoder_and_decoder(folder, i, n, *layers[0]["W_enc"].shape) for i in range(1, n)]
    ours = {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]}
    ours.setdefault("thresholds", torch.zeros(len(ours["W_enc"])))
    return build("CrossLayerJumpReLUSAE", ours, normalize="none", penalty="l0", n_sources=2 * n)


def read_encoder_and_decoder(folder: Path, i: int, n: int | None, *shape: int) -> dict[str, Tensor]:
    """Read the f latents that read layer i of n and write to layers i, ..., n - 1; `shape` is the expected (f, d).

    If n is None, it is not known, and W_dec has only the layers from i on.
    """
    file = folder / ENCODER.format(i)
    with Tensors(file, read_safetensors(file)) as t:
        W_enc = t.take(f"W_enc_{i}", *(shape or (None, None)))
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "b_enc": t.take(f"b_enc_{i}", f), "b_dec": t.take(f"b_dec_{i}", d).unsqueeze(0)}
        if f"threshold_{i}" in t.left:
            ours["thresholds"] = t.take(f"threshold_{i}", f)
    file = folder / DECODER.format(i)
    with Tensors(file, read_safetensors(file)) as t:
        written = t.take(f"W_dec_{i}", f, None if n is None else n - i, d)
    before = written.new_zeros(f, 0 if n is None else i, d)
    return ours | {"W_dec": torch.cat([before, written], dim=1)}


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any]) -> str | None:
    """Write a cross-layer transcoder, or one layer's transcoder into a folder that may already hold other layers.

    circuit-tracer loads the folder with `load_transcoders_from_cache(folder.name, folder.parent)`, or from the hub.

    Returns:
        For a single layer, the name of its file, which is the `sae_id` for `load_sae`; else None.

    Raises:
        UserError: circuit-tracer cannot represent the SAE, or the folder holds transcoders that do not match.
    """
    if not sae.n_inputs:
        raise UserError(
            "circuit-tracer cannot represent an SAE, only transcoders: train with experiment=transcoder or "
            "experiment=cross_layer."
        )
    cross_layer = isinstance(sae, CrossLayer)
    sae = check_exportable(sae, (), ("none",), "circuit-tracer", TRANSCODERS["circuit_tracer"])
    if provenance.get("model", {}).get("processing", "none") != "none":
        raise UserError(
            "circuit-tracer runs the unprocessed model, but this transcoder was trained on a processed one "
            f"({provenance['model']['processing']}): train with lm.compatibility_mode=false."
        )
    layers, hooks = layers_and_hooks(provenance.get("sites", []), sae.n_inputs, every_layer=cross_layer)
    model = provenance.get("model", {}).get("name")
    config = {"model_name": model, "model_kind": "cross_layer_transcoder" if cross_layer else "transcoder_set", **hooks}
    description = yaml.safe_dump(config, sort_keys=False)
    files = cross_layer_files(sae) if cross_layer else {LAYER.format(layers[0]): layer_file(sae)}
    check_folder(folder, description, files)
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors)
    write_atomically(folder / CONFIG, description.encode())  # last: circuit-tracer takes its presence as completeness
    log_layers(folder, layers if cross_layer else layers_in(folder), model)
    return None if cross_layer else LAYER.format(layers[0])


def layers_and_hooks(sites: Sequence[str], n_inputs: int, every_layer: bool) -> tuple[list[int], dict[str, str]]:
    """Return the layers of a transcoder, and the two entries of circuit-tracer's config that name its hooks.

    Args:
        sites: hook names; first those that are read, then those that are predicted.
        n_inputs: number of sites that are read.
        every_layer: for a cross-layer transcoder: the layers must be 0, 1, ..., n_inputs - 1.

    Raises:
        UserError: the sites are not one hook that is read and one that is predicted, at the same layers and in order.
    """
    found = [(int(match[1]), match[2]) for match in map(SITE.fullmatch, sites) if match]
    layers = [layer for layer, _ in found]
    read, written = found[:n_inputs], found[n_inputs:]
    hooks = {hook for _, hook in read}, {hook for _, hook in written}
    expected = list(range(n_inputs)) if every_layer else layers[:1]
    if len(found) < len(sites) or layers != 2 * expected or any(len(names) != 1 for names in hooks):
        layer, more = ("0", ",...") if every_layer else ("<layer>", "")
        raise UserError(
            "circuit-tracer needs one TransformerLens hook to read and one to predict, at "
            f"{'all layers of the model from 0 on' if every_layer else 'one layer of the model'}, "
            f"not lm.sites=[{', '.join(sites) or 'unknown'}]: "
            f"train with lm.sites=[blocks.{layer}.mlp.hook_in{more},blocks.{layer}.hook_mlp_out{more}]."
        )
    return expected, {"feature_input_hook": read[0][1], "feature_output_hook": written[0][1]}


def cross_layer_files(sae: Any) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file, by file name: encoder and b_dec of layer i, and decoder of its latents."""
    n, d = sae.layers.n_layers, sae.d_in
    f = sae.n_latents // n
    with inference_tensors(sae) as t:
        layers = {
            "W_enc": t.take("W_enc", n * f, 1, d).view(n, f, d),
            "b_enc": t.take("b_enc", n * f).view(n, f),
            "b_dec": t.take("b_dec", n, d),
            "threshold": take_thresholds(t, n * f).view(n, f),
        }
        W_dec = t.take("W_dec", n * f, n, d).view(n, f, n, d)
    encoders = {ENCODER.format(i): {f"{name}_{i}": tensor[i] for name, tensor in layers.items()} for i in range(n)}
    return encoders | {DECODER.format(i): {f"W_dec_{i}": W_dec[i, :, i:]} for i in range(n)}


def layer_file(sae: BaseSAE) -> dict[str, Tensor]:
    """Return the tensors of the file of a single-layer transcoder."""
    d, f = sae.d_in, sae.n_latents
    with single_source_tensors(sae) as t:
        theirs = {"W_enc": t.take("W_enc", f, d), "b_enc": t.take("b_enc", f)}
        theirs |= {"W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        if sae.config["skip"]:
            theirs["W_skip"] = t.take("W_skip", d, d)
        if type(sae).__name__ != "VanillaSAE":
            theirs[THRESHOLD] = take_thresholds(t, f)
    return theirs


def check_folder(folder: Path, description: str, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a UserError unless circuit-tracer can load these files together with those already in the folder.

    circuit-tracer takes the number of layers of a cross-layer transcoder from the number of files. Single-layer
    transcoders in one folder must have equally many latents, and either all or none a skip connection.
    """
    file = folder / CONFIG
    if file.is_file() and file.read_text() != description:
        raise UserError(
            f"{file} describes transcoders of another type, model or hook: export with out=<another folder>."
        )
    existing = {path.name for pattern in (ENCODER, LAYER) for path in folder.glob(pattern.format("*"))}
    for name in sorted(existing - files.keys())[:1]:  # one suffices: the others were compared to it when written
        cross_layer, ours = ENCODER.format(0) in files, next(iter(files.values()))
        if cross_layer or tensor_shapes(read_safetensors(folder / name)) != tensor_shapes(ours):
            raise UserError(
                f"{folder / name} cannot be in one folder with this transcoder: circuit-tracer needs layers of one "
                "size, all or none with a skip connection, and no other files: export with out=<another folder>."
            )


def tensor_shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each tensor except the thresholds, which not every layer has."""
    return {name: tensor.shape for name, tensor in tensors.items() if name != THRESHOLD}


def layers_in(folder: Path) -> list[int]:
    """Return the layers for which the folder has a single-layer transcoder."""
    names = [path.stem.removeprefix("layer_") for path in folder.glob(LAYER.format("*"))]
    return sorted(int(name) for name in names if name.isdigit())


def log_layers(folder: Path, layers: Sequence[int], model: str | None) -> None:
    """Log which layers the folder holds. Whether these are all is unknown: no file of the run has the model's depth."""
    log.info(
        "%s holds layers %s: circuit-tracer needs every layer of %s, from 0 on",
        folder,
        ", ".join(map(str, layers)),
        model or "the model",
    )
