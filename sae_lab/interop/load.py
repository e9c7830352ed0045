"""Load an SAE of ours or of another library: a file, a folder, a hub repository, a release of SAELens."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sae_lab.interop import circuit_tracer, dictionary_learning, download, gemma_scope, openai, sae_lens, sparsify
from sae_lab.interop.tensors import fold_decoder_norm as fold
from sae_lab.interop.tensors import untie
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder

FORMATS = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "circuit_tracer": circuit_tracer,
}


def load_sae(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    sae_id: str | None = None,
    fold_decoder_norm: bool = False,
) -> BaseSAE:
    """The SAE of a file, a folder or the hub, in eval mode, with the codes that the library it comes from computes.

    Args:
        source: a run folder or SAE folder of ours; a folder of SAELens, sparsify, dictionary_learning, Gemma Scope or
            circuit-tracer; a file of OpenAI's or of one of circuit-tracer's layers; `user/repository` on the hub; or a
            release of SAELens, whose table of them comes with `pip install --no-deps sae-lens` (its dependencies
            exclude those of this package).
        sae_id: which SAE of a release, or which folder or file of a folder or repository.
        fold_decoder_norm: give W_dec rows of unit norm, which training here assumes, and the codes their units.

    Raises:
        UserError: nothing of the kind is there, or a file that is broken, incomplete or not expressible exactly.
    """
    sae = read(source, sae_id)
    if fold_decoder_norm:
        if not sae.foldable:
            raise UserError(f"{type(sae).__name__} compares latents, so folding its norms would change its choice.")
        sae = untie(sae)
        fold(sae)
    return sae.eval().to(device)


def read(source: str | Path, sae_id: str | None) -> BaseSAE:
    path = Path(source).expanduser()
    if path.exists():
        return read_path(path / (sae_id or ""))
    if str(source).startswith(("/", ".", "~")):
        raise UserError(f"{source} is no folder or file: give an SAE folder, such as <run folder>/sae.")
    entry = download.find(str(source), sae_id)
    folder = download.download(entry)
    if is_format(folder, sae_lens.FILES):
        return read_format(sae_lens, folder, entry.overrides, entry.scale)
    return read_path(folder)


def read_path(path: Path) -> BaseSAE:
    if path.is_file():
        return read_format(circuit_tracer if path.suffix == ".safetensors" else openai, path)
    return read_folder(path)


def read_folder(folder: Path) -> BaseSAE:
    for format in FORMATS.values():
        if is_format(folder, format.FILES):
            return read_format(format, folder)
    return load_sae_folder(folder)


def read_format(format: ModuleType, folder: Path, *arguments: Any) -> BaseSAE:
    try:
        return format.read(folder, *arguments)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:  # a list for a name, a scale of 0
        raise UserError(f"{folder} says what nobody can mean ({first_line(e)}): get it again.") from e


def is_format(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / file).is_file() for file in files)
