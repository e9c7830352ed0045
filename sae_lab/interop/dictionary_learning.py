"""dictionary_learning: config.json and ae.pt."""

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
    parts,
    read_json,
    read_pickle,
    require,
    write_pickle,
)
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.saes.base import BaseSAE

FILES = CONFIG, WEIGHTS = "config.json", "ae.pt"


def read(folder: Path) -> BaseSAE:
    """The SAE of a dictionary_learning folder, with the codes that its `load_dictionary` gives.

    A norm factor of the activations is in the biases already. A k that ae.pt does not hold is config.json's.

    Raises:
        UserError: what Tensors raises, or another class than the seven that `load_dictionary` knows.
    """
    file = folder / CONFIG
    trainer = require(read_json(file), "trainer", file)
    name = require(trainer, "dict_class", file)
    if name not in READERS:
        raise UserError(f"{file} has the class {name!r}: known here are {', '.join(READERS)}.")
    with Tensors(folder / WEIGHTS, read_pickle(folder / WEIGHTS)) as t:
        return READERS[name](t, trainer)


def standard(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    sae = build("VanillaSAE", linears(t, b_dec="bias"), normalize="none")
    fold_decoder_norm(sae)  # as `load_dictionary` does for this class and no other
    return sae


def april_update(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    sae = build("VanillaSAE", linears(t, b_dec="decoder.bias"), normalize="none")
    add_input_bias(sae)
    return sae


def gated(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = linears(t, b_dec="decoder_bias", b_enc="gate_bias")
    f = len(ours["W_dec"])
    return build("GatedSAE", ours | {"r_mag": t.take("r_mag", f), "b_mag": t.take("mag_bias", f)}, normalize="none")


def jumprelu(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = matrices(t)
    ours["thresholds"] = t.take("threshold", len(ours["W_dec"])).clamp_min(0)  # relu(h · 1[h > threshold])
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none")
    add_input_bias(sae)
    return sae


def topk(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    t.drop("threshold")  # kept beside its rule, which is topk, and used on demand only
    return build("TopKSAE", linears(t, b_dec="b_dec"), k=take_k(t, trainer), normalize="none")


def batch_topk(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = linears(t, b_dec="b_dec") | {"threshold": t.take("threshold")}
    return build("BatchTopKSAE", ours, k=take_k(t, trainer), normalize="none")


def matryoshka(t: Tensors, trainer: dict[str, Any]) -> BaseSAE:
    ours = matrices(t) | {"threshold": t.take("threshold")}
    sizes = [int(size) for size in t.take("group_sizes", None).tolist()]
    return build("MatryoshkaSAE", ours, k=take_k(t, trainer), group_sizes=sizes, normalize="none")


READERS: dict[str, Callable[[Tensors, dict[str, Any]], BaseSAE]] = {
    "AutoEncoder": standard,
    "AutoEncoderNew": april_update,
    "GatedAutoEncoder": gated,
    "JumpReluAutoEncoder": jumprelu,
    "AutoEncoderTopK": topk,
    "BatchTopKSAE": batch_topk,
    "MatryoshkaBatchTopKSAE": matryoshka,
}


def linears(t: Tensors, b_dec: str, b_enc: str = "encoder.bias") -> dict[str, Tensor]:
    """Weights kept as two nn.Linear: the encoder (f, d), the decoder (d, f)."""
    W_enc = t.take("encoder.weight", None, None)
    f, d = W_enc.shape
    ours = {"W_enc": W_enc, "W_dec": t.take("decoder.weight", d, f).T}
    return ours | {"b_enc": t.take(b_enc, f), "b_dec": t.take(b_dec, d)}


def matrices(t: Tensors) -> dict[str, Tensor]:
    """Weights kept as matrices: W_enc (d, f), W_dec (f, d)."""
    W_dec = t.take("W_dec", None, None)
    f, d = W_dec.shape
    return {"W_enc": t.take("W_enc", d, f).T, "W_dec": W_dec, "b_enc": t.take("b_enc", f), "b_dec": t.take("b_dec", d)}


def take_k(t: Tensors, trainer: dict[str, Any]) -> int:
    """k, once or twice in the same words."""
    said = trainer.get("k")
    k = int(t.take("k")) if "k" in t.left else require(trainer, "k", CONFIG)
    if said is not None and said != k:
        raise UserError(f"{t.source} has k={k} and its {CONFIG} k={said}: correct {CONFIG}.")
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
    """A folder that `load_dictionary` loads, of an SAE of rows as they are.

    Raises:
        UserError: dictionary_learning has no form for it, or a k that is not whole.
    """
    sae = check_exportable(sae, CLASSES, ("none",), "dictionary_learning")
    name, k = CLASSES[type(sae).__name__], sae.config.get("k") or 0
    if name == "AutoEncoder" and not has_unit_rows(sae):
        name = "AutoEncoderNew"  # `load_dictionary` divides by the norms in the other, which changes the codes' units
    with parts(sae) as t:
        theirs = WRITERS[name](t, sae)
    said = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.n_latents}
    said |= {
        "lm_name": provenance.get("model", {}).get("name"),
        "submodule_name": (provenance.get("sites") or [None])[0],
    }
    if "TopK" in name:
        if k != int(k):
            raise UserError(f"dictionary_learning has no form for k={k}: its k is whole.")
        theirs["k"] = torch.tensor(int(k), dtype=torch.int)
        said["k"] = int(k)
    write_pickle(folder / WEIGHTS, theirs)
    write_json(folder / CONFIG, {"trainer": said, "buffer": {"ctx_len": provenance.get("data", {}).get("seq_len")}})


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
    """Their encoder takes x, ours x - b_dec."""
    theirs = to_linears(t, "decoder.bias")
    return theirs | {"encoder.bias": theirs["encoder.bias"] - theirs["encoder.weight"] @ theirs["decoder.bias"]}


def to_jumprelu(t: Tensors, sae: BaseSAE) -> dict[str, Tensor]:
    """Their encoder takes x, ours x - b_dec."""
    theirs = to_matrices(t) | {"threshold": t.take("thresholds", None)}
    return theirs | {"b_enc": theirs["b_enc"] - theirs["b_dec"] @ theirs["W_enc"]}


def to_topk(t: Tensors, sae: BaseSAE) -> dict[str, Tensor]:
    return to_linears(t, "b_dec") | {"threshold": torch.tensor(-1.0)}  # -1: never estimated


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
