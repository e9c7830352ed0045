"""Load an SAE of ours or of another library from a file, a folder, a hub repository or a SAELens release."""

import logging
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

log = logging.getLogger(__name__)

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
    """Load an SAE in eval mode. An SAE of another library computes the same codes as in that library.

    Args:
        source: a run folder or SAE folder of ours; a folder of SAELens, sparsify, dictionary_learning, Gemma Scope or
            circuit-tracer; a file of OpenAI's sparse_autoencoder or of one circuit-tracer layer; `user/repository` on
            the hub; or a SAELens release. For releases, `pip install --no-deps sae-lens` (without dependencies, as
            those conflict with this package's).
        device: device to move the SAE to.
        sae_id: the SAE's id in a release, or its folder or file inside a folder or repository.
        fold_decoder_norm: scale the rows of W_dec to unit norm, which training here assumes, and rescale the codes.

    Raises:
        UserError: there is no such SAE, or its file is broken, incomplete or has no exact counterpart here.
    """
    sae = read(source, sae_id)
    if fold_decoder_norm:
        if not sae.foldable:
            raise UserError(
                f"{type(sae).__name__} compares latents, so folding its norms would change which ones it selects: "
                "use fold_decoder_norm=False."
            )
        sae = untie(sae)
        fold(sae)
    return sae.eval().to(device)


def read(source: str | Path, sae_id: str | None) -> BaseSAE:
    path = Path(source).expanduser()
    if path.exists():
        return read_path(path / stay_inside(sae_id or ""))
    if str(source).startswith(("/", ".", "~")):
        raise UserError(f"{source} is not a folder or file: give an SAE folder, such as <run folder>/sae.")
    entry = download.find_entry(str(source), sae_id)
    stay_inside(entry.path)
    folder = download.download(entry)
    if is_format(folder, sae_lens.FILES):
        return read_format(sae_lens, folder, entry.overrides, entry.scale)
    return read_path(folder)


def stay_inside(name: str) -> str:
    """Return the path of an SAE in its folder; raise a UserError if it leads out of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"sae_id={name} leads out of its folder: give a file or folder in it.")
    return name


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
    log.warning("%s has no digests: damage to its numbers cannot be noticed.", folder)
    try:
        return format.read(folder, *arguments)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:  # e.g. a list for a name, scale=0
        raise UserError(f"{folder} holds an invalid value ({first_line(e)}): download it again.") from e


def is_format(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / file).is_file() for file in files)
