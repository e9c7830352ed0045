"""By which tensors a file of one SAE is recognised, and what a file that cannot be read looks like."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

LAYOUTS: list[tuple[str, dict[str, str]]] = [
    ("circuit_tracer", {"W_enc": "fd", "W_dec": "fd", "b_enc": "f", "b_dec": "d"}),
    ("qwen_scope", {"W_enc": "fd", "W_dec": "df", "b_enc": "f", "b_dec": "d"}),
    ("matrices", {"W_enc": "df", "W_dec": "fd", "b_enc": "f", "b_dec": "d"}),
    ("matrices", {"W_enc": "sdf", "W_dec": "fsd", "b_enc": "f", "b_dec": "sd"}),
    (
        "linear_layers",
        {
            "encoder_linear.weight": "fd",
            "encoder_linear.bias": "f",
            "decoder_linear.weight": "df",
            "decoder_linear.bias": "d",
        },
    ),
    ("linear_layers", {"encoder.weight": "fd", "encoder.bias": "f", "decoder.weight": "df", "decoder.bias": "d"}),
    ("crosscoders", {"encoder.weight": "sdf", "encoder.bias": "f", "decoder.weight": "sfd", "decoder.bias": "sd"}),
    ("openai", {"encoder.weight": "fd", "latent_bias": "f", "pre_bias": "d"}),
]
"""Formats of one file, each with its tensors and their shapes: f latents, d dimensions, s sources."""

FOLDERS: dict[str, set[str]] = {
    "Gemma Scope": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "Gemma Scope 2": {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"},
    "dictionary_learning": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"},
    "dictionary_learning (AutoEncoder)": {"encoder.weight", "encoder.bias", "decoder.weight", "bias"},
    "sparsify": {"encoder.weight", "encoder.bias", "W_dec", "b_dec"},
    "Llama Scope": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "log_jumprelu_threshold"},
    "a temporal SAE of canrager/temporalSAEs": {"D", "b", "E", "attn_layers.0.k_ctx.weight"},
}
"""Tensors of formats that are folders."""

TITLES = {
    "circuit_tracer": "circuit-tracer (a transcoder of one layer)",
    "qwen_scope": "Qwen-Scope",
    "matrices": "Nanda's SAEs or a crosscoder of models",
    "linear_layers": "Goodfire's or qresearch's SAEs",
    "crosscoders": "crosscoders of dictionary_learning's forks",
    "openai": "OpenAI's sparse_autoencoder",
}
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, which stands for the file",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"PK\x03\x04": "a zip archive, as torch.save and NumPy's .npz are",
    b"\x1f\x8b": "a gzip archive",
    b"\x80": "a bare pickle, of torch.save before version 1.6 or of Python",
    b"\x89HDF": "an HDF5 file",
    b"{": "JSON",
}


def matching(tensors: Mapping[str, Any]) -> list[str]:
    """Return the formats whose tensors are all there, in shapes that agree with one another."""
    return list(dict.fromkeys(name for name, layout in LAYOUTS if fits(layout, tensors)))


def fits(layout: Mapping[str, str], tensors: Mapping[str, Any]) -> bool:
    sizes: dict[str, int] = {}
    for name, letters in layout.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor) or tensor.ndim != len(letters):
            return False
        if any(sizes.setdefault(a, n) != n for a, n in zip(letters, tensor.shape, strict=True)):
            return False
    return True


def most_like(names: Iterable[str]) -> str:
    """Return ", most like those of <format>" for the format with the most names in common; "" if none has any."""
    names = set(names)
    known = [(TITLES[name], set(layout)) for name, layout in LAYOUTS] + list(FOLDERS.items())
    title, theirs = max(known, key=lambda item: len(item[1] & names) / len(item[1] | names))
    return f", most like those of {title}" if theirs & names else ""


def kind_of_file(file: Path) -> str:
    """Return what a file is by its first bytes, for a message."""
    if not file.is_file():
        return "missing"
    with file.open("rb") as f:
        head = f.read(64).lower()
    if not head:
        return "empty"
    if head[8:9] == b"{":
        return f"safetensors, with {file.stat().st_size:,} bytes"
    kind = next((kind for start, kind in BEGINNINGS.items() if head.startswith(start.lower())), "of no known kind")
    return f"{kind}, with {file.stat().st_size:,} bytes"
