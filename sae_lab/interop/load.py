"""Load an SAE of ours or of another library from a file, a folder, a hub repository or a release."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sae_lab.interop import (
    batch_topk,
    circuit_tracer,
    crosscoders,
    dictionary_learning,
    download,
    gemma_scope,
    gemma_scope_2,
    linear_layers,
    llama_scope,
    llama_scope_r1,
    matrices,
    openai,
    qwen_scope,
    sae_lens,
    sparsify,
)
from sae_lab.interop.layouts import TITLES, matching, most_like
from sae_lab.interop.releases import UNREADABLE
from sae_lab.interop.tensors import fold_decoder_norm as fold
from sae_lab.interop.tensors import read_pickle, read_safetensors, untie
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.near_paths import no_such_path
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder
from sae_lab.saes.weights import holds_weights

log = logging.getLogger(__name__)

FORMATS = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "batch_topk": batch_topk,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "llama_scope_r1": llama_scope_r1,
    "circuit_tracer": circuit_tracer,
}
"""Formats that are folders, known by the names of their files."""

FILE_FORMATS = {
    "circuit_tracer": circuit_tracer,
    "crosscoders": crosscoders,
    "linear_layers": linear_layers,
    "matrices": matrices,
    "openai": openai,
    "qwen_scope": qwen_scope,
}
"""Formats that are one file, known by the names and shapes of its tensors (layouts.py)."""


@check_call
def load_sae(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    sae_id: str | None = None,
    fold_decoder_norm: bool = False,
    latents: range | None = None,
) -> BaseSAE:
    """Load an SAE in eval mode. An SAE of another library computes the same codes as in that library.

    Args:
        source: a run folder or SAE folder of ours; a folder or file of another library (docs/interop.md lists the
            formats); `user/repository` on the hub; or a release, such as gemma-scope-2b-pt-res (see releases.yaml).
        device: device to move the SAE to.
        sae_id: the SAE's id in a release, or its folder or file inside a folder or repository.
        latents: of an SAE folder of ours, read these latents only, such as range(0, 1024). The SAE then codes with them
            alone: the codes are those of the whole SAE, unless its rule compares latents (top-k), and x_hat is what
            they add to b_dec.
        fold_decoder_norm: scale the rows of W_dec to unit norm, which training here assumes, and rescale the codes.

    Raises:
        UserError: there is no such SAE, or its file is broken, incomplete or has no exact counterpart here.
    """
    sae = read(source, sae_id) if latents is None else read_slice(source, sae_id, latents)
    if fold_decoder_norm:
        if not sae.foldable:
            raise UserError(
                f"{type(sae).__name__} compares latents, so folding its norms would change which ones it selects: "
                "use fold_decoder_norm=False."
            )
        sae = untie(sae)
        fold(sae)
    return sae.eval().to(resolve_device(str(device)))


def read_slice(source: str | Path, sae_id: str | None, latents: range) -> BaseSAE:
    """Read some latents of an SAE folder of ours; raise a UserError for anything else."""
    folder = Path(source).expanduser() / stay_inside(sae_id or "")
    if not any(holds_weights(place) for place in (folder, folder / "sae")):
        raise UserError(
            f"latents={latents} can be read of an SAE folder of this library only, which {folder} is not: leave it "
            "out, or export the SAE with format=sae_lab first."
        )
    return load_sae_folder(folder, latents=latents)


def read(source: str | Path, sae_id: str | None) -> BaseSAE:
    found = find_sae(source, sae_id)
    if isinstance(found, Path):
        return read_path(found)
    return read_path(download.download(found), found.format, found.facts)


def find_sae(source: str | Path, sae_id: str | None = None) -> Path | download.Entry:
    """Return where an SAE is, here or on the hub, which is not asked. Reads no weights.

    Raises:
        UserError: there is no such path or release here, or the release cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        inside = path / stay_inside(sae_id or "")
        if not inside.exists():
            raise UserError(no_such_path(str(inside)))
        return inside
    entry = download.find_entry(str(source), sae_id)
    stay_inside(entry.path)
    if entry.format in UNREADABLE:
        raise UserError(f"{source} is {UNREADABLE[entry.format]}, so it cannot be loaded.")
    return entry


def stay_inside(name: str) -> str:
    """Return the path of an SAE in its folder; raise a UserError if it leads out of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"sae_id={name} leads out of its folder: give a file or folder in it.")
    return name


def read_path(path: Path, expected: str | None = None, facts: dict[str, Any] | None = None) -> BaseSAE:
    """Read a folder or file in the format that it has; `facts` are for the reader of the format `expected`."""

    def known(name: str) -> dict[str, Any]:
        return facts or {} if name == expected else {}

    if path.is_file():
        return read_file(path, known)
    for name, format in FORMATS.items():
        if any(is_format(path, files) for files in (format.FILES, getattr(format, "FILES_BY_LAYER", format.FILES))):
            return read_format(format, path, **known(name))
    inside = path / "model.safetensors"
    return read_file(inside, known) if inside.is_file() else load_sae_folder(path)


def read_file(file: Path, known: Callable[[str], dict[str, Any]]) -> BaseSAE:
    """Read an SAE that is one file."""
    if circuit_tracer.ONE_ENCODER.fullmatch(file.name):
        return read_format(circuit_tracer, file)
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    names = matching(tensors)
    if not names:
        raise UserError(
            f"{file} has tensors that no reader of single files knows, {', '.join(tensors)}{most_like(tensors)}: "
            "a folder may be needed instead; docs/interop.md lists the formats."
        )
    if len(names) > 1:
        titles = " or ".join(TITLES[name] for name in names)
        raise UserError(f"{file} may be of {titles}, as it has as many latents as dimensions: it cannot be told which.")
    return read_format(FILE_FORMATS[names[0]], file, tensors, **known(names[0]))


def read_format(format: ModuleType, path: Path, *tensors: Any, **facts: Any) -> BaseSAE:
    log.warning("%s has no digests: damage to its numbers cannot be noticed.", path)
    try:
        return format.read(path, *tensors, **facts)
    except (
        ArithmeticError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as e:  # e.g. a list for a name
        kind = format.__name__.rpartition(".")[2]
        raise UserError(f"{path} looks like {kind}, but holds an invalid value ({first_line(e)}).") from e


def is_format(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / file).is_file() for file in files)
