"""circuit-tracer: the transcoders of all layers of a model, from which it builds attribution graphs.

A cross-layer transcoder is W_enc_<layer>.safetensors and W_dec_<layer>.safetensors, transcoders of one layer each are
layer_<layer>.safetensors; beside them config.yaml says what kind they are and at which of TransformerLens' hooks.
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
    parts,
    read_safetensors,
    thresholds,
    whole,
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
THRESHOLD = "activation_function.threshold"
SITE = re.compile(r"blocks\.(\d+)\.(.+)")


def read(path: Path) -> BaseSAE:
    """The cross-layer transcoder of a folder, or the transcoder of a layer's file, with the codes that it has there.

    Raises:
        UserError: what Tensors raises.
    """
    return read_layer(path) if path.is_file() else read_cross_layer(path)


def read_layer(file: Path) -> BaseSAE:
    """h = x W_encᵀ + b_enc, y_hat = z W_dec + b_dec [+ x W_skipᵀ]; ReLU, or JumpReLU where there is a threshold."""
    with Tensors(file, read_safetensors(file)) as t:
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
    """The latents of all layers, one layer after the other; without thresholds they are ReLU's, which are zero."""
    n = len(list(folder.glob(ENCODER.format("*"))))
    layers = [read_encoder_and_decoder(folder, 0, n)]
    layers += [read_encoder_and_decoder(folder, i, n, *layers[0]["W_enc"].shape) for i in range(1, n)]
    ours = {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]}
    ours.setdefault("thresholds", torch.zeros(len(ours["W_enc"])))
    return build("CrossLayerJumpReLUSAE", ours, normalize="none", penalty="l0", n_sources=2 * n)


def read_encoder_and_decoder(folder: Path, i: int, n: int, *shape: int) -> dict[str, Tensor]:
    """What belongs to layer i of n: f latents, which read it and write to it and the layers after it."""
    file = folder / ENCODER.format(i)
    with Tensors(file, read_safetensors(file)) as t:
        W_enc = t.take(f"W_enc_{i}", *(shape or (None, None)))
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "b_enc": t.take(f"b_enc_{i}", f), "b_dec": t.take(f"b_dec_{i}", d).unsqueeze(0)}
        if f"threshold_{i}" in t.left:
            ours["thresholds"] = t.take(f"threshold_{i}", f)
    file = folder / DECODER.format(i)
    with Tensors(file, read_safetensors(file)) as t:
        written = t.take(f"W_dec_{i}", f, n - i, d)
    return ours | {"W_dec": torch.cat([written.new_zeros(f, i, d), written], dim=1)}


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any]) -> str | None:
    """The files that circuit-tracer loads: a cross-layer transcoder, or one layer's beside those of other layers.

    Its hub loader takes them from a repository, `load_transcoders_from_cache(folder.name, folder.parent)` from here.

    Returns:
        the name of a layer's file, by which `load_sae` tells it from others of the folder.

    Raises:
        UserError: circuit-tracer has no form for it, or the folder holds something else.
    """
    if not sae.n_inputs:
        raise UserError(
            "circuit-tracer has no form for an SAE, only for transcoders: train experiment=transcoder or cross_layer."
        )
    crosses = isinstance(sae, CrossLayer)
    sae = check_exportable(sae, (), ("none",), "circuit-tracer", TRANSCODERS["circuit_tracer"])
    if provenance.get("model", {}).get("processing", "none") != "none":
        raise UserError(
            "circuit-tracer runs a model as it is, and this transcoder's was processed "
            f"({provenance['model']['processing']}): train with lm.compatibility_mode=false."
        )
    layers, hooks = places(provenance.get("sites", []), sae.n_inputs, every_layer=crosses)
    model = provenance.get("model", {}).get("name")
    config = {"model_name": model, "model_kind": "cross_layer_transcoder" if crosses else "transcoder_set", **hooks}
    description = yaml.safe_dump(config, sort_keys=False)
    files = cross_layer_files(sae) if crosses else {LAYER.format(layers[0]): layer_file(sae)}
    check_folder(folder, description, files)
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors)
    write_atomically(folder / CONFIG, description.encode())  # the last: where it is, circuit-tracer takes all as there
    log_layers(folder, layers if crosses else layers_of(folder), model)
    return None if crosses else LAYER.format(layers[0])


def places(sites: Sequence[str], n_inputs: int, every_layer: bool) -> tuple[list[int], dict[str, str]]:
    """The layers, and the hooks at which a transcoder reads and writes them, in circuit-tracer's words.

    Raises:
        UserError: not one hook to read and one to write, of the same layers, or not every layer from 0 on, in order.
    """
    found = [(int(match[1]), match[2]) for match in map(SITE.fullmatch, sites) if match]
    layers = [layer for layer, _ in found]
    read, written = found[:n_inputs], found[n_inputs:]
    hooks = {hook for _, hook in read}, {hook for _, hook in written}
    due = list(range(n_inputs)) if every_layer else layers[:1]
    if len(found) < len(sites) or layers != 2 * due or any(len(names) != 1 for names in hooks):
        layer, more = ("0", ",...") if every_layer else ("<layer>", "")
        raise UserError(
            f"circuit-tracer has {'all layers of a model from 0 on' if every_layer else 'one layer of a model'}, by "
            f"TransformerLens' names of one place to read and one to write, not {', '.join(sites) or 'unknown sites'}: "
            f"train with lm.sites=[blocks.{layer}.mlp.hook_in{more},blocks.{layer}.hook_mlp_out{more}]."
        )
    return due, {"feature_input_hook": read[0][1], "feature_output_hook": written[0][1]}


def cross_layer_files(sae: Any) -> dict[str, dict[str, Tensor]]:
    """By name the tensors of each file: of layer i what reads it, b_dec, and what its latents write to i and after."""
    n, f, d = sae.n_parts, sae.n_latents // sae.n_parts, sae.d_in
    with whole(sae) as t:
        layers = {
            "W_enc": t.take("W_enc", n * f, 1, d).view(n, f, d),
            "b_enc": t.take("b_enc", n * f).view(n, f),
            "b_dec": t.take("b_dec", n, d),
            "threshold": thresholds(t, n * f).view(n, f),
        }
        W_dec = t.take("W_dec", n * f, n, d).view(n, f, n, d)
    encoders = {ENCODER.format(i): {f"{name}_{i}": tensor[i] for name, tensor in layers.items()} for i in range(n)}
    return encoders | {DECODER.format(i): {f"W_dec_{i}": W_dec[i, :, i:]} for i in range(n)}


def layer_file(sae: BaseSAE) -> dict[str, Tensor]:
    """The tensors of a layer's file."""
    d, f = sae.d_in, sae.n_latents
    with parts(sae) as t:
        theirs = {"W_enc": t.take("W_enc", f, d), "b_enc": t.take("b_enc", f)}
        theirs |= {"W_dec": t.take("W_dec", f, d), "b_dec": t.take("b_dec", d)}
        if sae.config["skip"]:
            theirs["W_skip"] = t.take("W_skip", d, d)
        if type(sae).__name__ != "VanillaSAE":
            theirs[THRESHOLD] = thresholds(t, f)
    return theirs


def check_folder(folder: Path, description: str, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a UserError unless circuit-tracer can load what the folder holds already together with these files.

    It counts the files of a cross-layer transcoder; layers of a set have equally many latents, and all or none a skip.
    """
    file = folder / CONFIG
    if file.is_file() and file.read_text() != description:
        raise UserError(f"{file} is of transcoders of another kind, model or hook: give out=<another folder>.")
    there = {path.name for pattern in (ENCODER, LAYER) for path in folder.glob(pattern.format("*"))}
    for name in sorted(there - files.keys())[:1]:  # the others were held against it
        crosses, ours = ENCODER.format(0) in files, next(iter(files.values()))
        if crosses or sizes(read_safetensors(folder / name)) != sizes(ours):
            raise UserError(
                f"{folder / name} does not go with this transcoder, for circuit-tracer wants layers of one size, all "
                "or none with a skip connection, and no others: give out=<another folder>."
            )


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items() if name != THRESHOLD}


def layers_of(folder: Path) -> list[int]:
    """Which layers' files a folder holds."""
    names = [path.stem.removeprefix("layer_") for path in folder.glob(LAYER.format("*"))]
    return sorted(int(name) for name in names if name.isdigit())


def log_layers(folder: Path, layers: Sequence[int], model: str | None) -> None:
    """Say which layers are there: which a model has, no file of the run tells."""
    log.info(
        "%s holds layers %s: circuit-tracer wants those of every block of %s, from 0 on",
        folder,
        ", ".join(map(str, layers)),
        model or "the model",
    )
