"""Read and write dictionary_learning's SAEs: config.json and ae.pt."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lab.interop.tensors import (
    Tensors,
    add_input_bias,
    build,
    check_exportable,
    fold_decoder_norm,
    has_unit_rows,
    read_json,
    read_pickle,
    require,
    single_source_tensors,
    write_pickle,
)
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.saes.base import BaseSAE

FILES = CONFIG, WEIGHTS = "config.json", "ae.pt"


def read(folder: Path) -> BaseSAE:
    """Read a dictionary_learning folder; the codes are those of an SAE from its `load_dictionary`.

    The trainer has already folded its scaling of the activations into the biases. If ae.pt does not hold k, it is taken
    from config.json.

    Raises:
        UserError: the errors of Tensors; the class is not one of the seven that `load_dictionary` supports.
    """
    file = folder / CONFIG
    trainer = require(read_json(file), "trainer", file)
    name = require(trainer, "dict_class", file)
    if name not in READERS:
        raise UserError(f"{file} has dict_class {name!r}: it must be one of {', '.join(READERS)}.")
    with Tensors(folder / WEIGHTS, read_pickle(folder / WEIGHTS)) as t:
        return READERS[name](t, trainer)


def read_standard(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    sae = build("VanillaSAE", take_linears(t, b_dec="bias"), normalize="none")
    fold_decoder_norm(sae)  # `load_dictionary` does so for this class only
    return sae


def read_april_update(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    sae = build("VanillaSAE", take_linears(t, b_dec="decoder.bias"), normalize="none")
    add_input_bias(sae)
    return sae


def read_gated(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = take_linears(t, b_dec="decoder_bias", b_enc="gate_bias")
    f = len(ours["W_dec"])
    return build("GatedSAE", ours | {"r_mag": t.take("r_mag", f), "b_mag": t.take("mag_bias", f)}, normalize="none")


def read_jumprelu(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = take_matrices(t)
    ours["thresholds"] = t.take("threshold", len(ours["W_dec"])).clamp_min(0)  # relu(h · 1[h > threshold])
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none")
    add_input_bias(sae)
    return sae


def read_topk(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    t.drop("threshold")  # an estimate that dictionary_learning uses only on request; its default rule is top-k
    return build("TopKSAE", take_linears(t, b_dec="b_dec"), k=take_k(t, trainer), normalize="none")


def read_batch_topk(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = take_linears(t, b_dec="b_dec") | {"threshold": t.take("threshold")}
    return build("BatchTopKSAE", ours, k=take_k(t, trainer), normalize="none")


def read_matryoshka(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = take_matrices(t) | {"threshold": t.take("threshold")}
    sizes = [int(size) for size in t.take("group_sizes", None).tolist()]
    return build("MatryoshkaSAE", ours, k=take_k(t, trainer), group_sizes=sizes, normalize="none")


READERS: dict[str, Callable[[Tensors, dict[str, Any]], BaseSAE]] = {
    "AutoEncoder": read_standard,
    "AutoEncoderNew": read_april_update,
    "GatedAutoEncoder": read_gated,
    "JumpReluAutoEncoder": read_jumprelu,
    "AutoEncoderTopK": read_topk,
    "BatchTopKSAE": read_batch_topk,
    "MatryoshkaBatchTopKSAE": read_matryoshka,
}


def take_linears(t: Tensors, b_dec: str, b_enc: str = "encoder.bias") -> dict[str, Tensor]:
    """Take weights stored as two nn.Linear: the encoder (f, d) and the decoder (d, f)."""
    W_enc = t.take("encoder.weight", None, None)
    f, d = W_enc.shape
    ours = {"W_enc": W_enc, "W_dec": t.take("decoder.weight", d, f).T}
    return ours | {"b_enc": t.take(b_enc, f), "b_dec": t.take(b_dec, d)}


def take_matrices(t: Tensors) -> dict[str, Tensor]:
    """Take weights stored as matrices: W_enc (d, f) and W_dec (f, d)."""
    W_dec = t.take("W_dec", None, None)
    f, d = W_dec.shape
    return {"W_enc": t.take("W_enc", d, f).T, "W_dec": W_dec, "b_enc": t.take("b_enc", f), "b_dec": t.take("b_dec", d)}


def take_k(t: Tensors, trainer: dict[str, Any]) -> int:
    """Take k from ae.pt, else from config.json; raise a UserError if the two differ."""
    config_k = trainer.get("k")
    k = int(t.take("k")) if "k" in t.left else require(trainer, "k", CONFIG)
    if config_k is not None and config_k != k:
        raise UserError(f"{t.source} has k={k}, but {CONFIG} has k={config_k}: correct {CONFIG}.")
    return k


CLASSES = {
    "VanillaSAE": "AutoEncoder",
    "GatedSAE": "GatedAutoEncoder",
    "JumpReLUSAE": "JumpReluAutoEncoder",
    "TopKSAE": "AutoEncoderTopK",
    "MatryoshkaTopKSAE": "AutoEncoderTopK",
    "BatchTopKSAE": "BatchTopKSAE",
    "MatryoshkaSAE": "MatryoshkaBatchTopKSAE",
}


def write(sae: BaseSAE, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write a folder that dictionary_learning's `load_dictionary` loads.

    Raises:
        UserError: dictionary_learning cannot represent the SAE, or k is not an integer.
    """
    sae = check_exportable(sae, CLASSES, ("none",), "dictionary_learning")
    name, k = CLASSES[type(sae).__name__], sae.config.get("k") or 0
    if name == "AutoEncoder" and not has_unit_rows(sae):
        name = "AutoEncoderNew"  # for AutoEncoder, `load_dictionary` normalizes W_dec, which would rescale the codes
    with single_source_tensors(sae) as t:
        theirs = WRITERS[name](t, sae)
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.n_latents}
    trainer |= {
        "lm_name": provenance.get("model", {}).get("name"),
        "submodule_name": (provenance.get("sites") or [None])[0],
    }
    if "TopK" in name:
        if k != int(k):
            raise UserError(f"dictionary_learning cannot represent k={k}: k must be an integer.")
        theirs["k"] = torch.tensor(int(k), dtype=torch.int)
        trainer["k"] = int(k)
    write_pickle(folder / WEIGHTS, theirs)
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": provenance.get("data", {}).get("seq_len")}})


def to_linears(t: Tensors, b_dec: str, b_enc: str = "encoder.bias") -> dict[str, Tensor]:
    theirs = {"encoder.weight": t.take("W_enc", None, None), "decoder.weight": t.take("W_dec", None, None).T}
    return theirs | {b_enc: t.take("b_enc", None), b_dec: t.take("b_dec", None)}


def to_matrices(t: Tensors) -> dict[str, Tensor]:
    names = {"W_dec": 2, "b_enc": 1, "b_dec": 1}
    return {"W_enc": t.take("W_enc", None, None).T} | {name: t.take(name, *[None] * n) for name, n in names.items()}


def to_gated(t: Tensors, sae: BaseSAE) -> dict[str, Tensor]:
    magnitude = {"r_mag": t.take("r_mag", None), "mag_bias": t.take("b_mag", None)}
    return to_linears(t, "decoder_bias", "gate_bias") | magnitude


def to_april_update(t: Tensors, sae: BaseSAE) -> dict[str, Tensor]:
    """Return their tensors; the encoder reads x there and x - b_dec here, which changes its bias."""
    theirs = to_linears(t, "decoder.bias")
    return theirs | {"encoder.bias": theirs["encoder.bias"] - theirs["encoder.weight"] @ theirs["decoder.bias"]}


def to_jumprelu(t: Tensors, sae: BaseSAE) -> dict[str, Tensor]:
    """Return their tensors; the encoder reads x there and x - b_dec here, which changes its bias."""
    theirs = to_matrices(t) | {"threshold": t.take("thresholds", None)}
    return theirs | {"b_enc": theirs["b_enc"] - theirs["b_dec"] @ theirs["W_enc"]}


def to_topk(t: Tensors, sae: BaseSAE) -> dict[str, Tensor]:
    return to_linears(t, "b_dec") | {"threshold": torch.tensor(-1.0)}  # -1: not estimated


def to_matryoshka(t: Tensors, sae: Any) -> dict[str, Tensor]:
    return to_matrices(t) | {"threshold": t.take("threshold"), "group_sizes": torch.tensor(sae.sizes)}


WRITERS: dict[str, Callable[[Tensors, Any], dict[str, Tensor]]] = {
    "AutoEncoder": lambda t, sae: to_linears(t, "bias"),
    "AutoEncoderNew": to_april_update,
    "GatedAutoEncoder": to_gated,
    "JumpReluAutoEncoder": to_jumprelu,
    "AutoEncoderTopK": to_topk,
    "BatchTopKSAE": lambda t, sae: to_linears(t, "b_dec") | {"threshold": t.take("threshold")},
    "MatryoshkaBatchTopKSAE": to_matryoshka,
}
