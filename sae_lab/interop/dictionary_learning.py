"""dictionary_learning: config.json and ae.pt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lab.errors import UserError
from sae_lab.interop.tensors import (
    Tensors,
    add_input_bias,
    build,
    fold_decoder_norm,
    need,
    read_json,
    read_pickle,
)
from sae_lab.saes.base import BaseSAE

FILES = CONFIG, WEIGHTS = "config.json", "ae.pt"


def read(folder: Path) -> BaseSAE:
    """The SAE of a dictionary_learning folder, with the codes that its `load_dictionary` gives.

    A norm factor of the activations is in the biases already. A k that ae.pt does not hold is config.json's.

    Raises:
        UserError: what Tensors raises, or another class than the seven that `load_dictionary` knows.
    """
    file = folder / CONFIG
    trainer = need(read_json(file), "trainer", file)
    name = need(trainer, "dict_class", file)
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
    k = int(t.take("k")) if "k" in t.left else need(trainer, "k", CONFIG)
    if said is not None and said != k:
        raise UserError(f"{t.source} has k={k} and its {CONFIG} k={said}: correct {CONFIG}.")
    return k
