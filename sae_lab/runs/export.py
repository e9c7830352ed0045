"""Export an SAE in the files of this or another library, with figures and a model card; push it to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.interop.load import FORMATS, load_sae
from sae_lab.interop.slices import slices_of_folder
from sae_lab.runs.card import write_card, write_dashboards_card
from sae_lab.runs.dashboards import DASHBOARDS, Names, write_dashboards
from sae_lab.runs.digests import SAE, check_unaltered
from sae_lab.runs.folder import check_links
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_json, write_atomically
from sae_lab.runtime.hub import hub_errors
from sae_lab.runtime.private import public
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import CONFIG, copy_sae, sae_folder, save_sae
from sae_lab.saes.weights import holds_weights, weight_files

OURS = "sae_lab"
BY_SLICES = ("sae_lens", "sparsify")
"""Formats that can be written without the whole SAE in memory; a file of torch.save cannot."""
LARGE = 2**30
"""Bytes of an SAE that is exported by slices. What it computes is then not compared with its probe."""
WRITERS = {name: format.write for name, format in FORMATS.items() if hasattr(format, "write")}


def export_sae(source: str | Path, format: str, out: Path, sae_id: str | None = None) -> list[Path]:
    """Write an SAE, its figures and a model card into `out`, without secrets and folders (runtime/private.py).

    Args:
        source, sae_id: a run folder, or anything else that `load_sae` reads.
        format: the file format.
        out: the folder to write into.

    Returns:
        The files of the export: what was written, and weights that earlier exports of other layers left in `out`.

    Raises:
        UserError: the format is unknown, there is no such SAE, or the format cannot express it.
    """
    check_format(format)
    folder, before = folder_of(source, sae_id), inodes(out)
    if is_ours := is_of_this_library(folder):
        check_links(folder)
        check_unaltered(folder, SAE)
    by_slices = is_ours and format in BY_SLICES and is_large(folder)
    sae, read = slices_of_folder(folder) if by_slices else (load_sae(source, sae_id=sae_id), None)
    provenance = provenance_of(folder)
    written_as: str | None = None
    if read is not None:
        WRITERS[format](sae, out, provenance, read)
    elif format != OURS:
        written_as = WRITERS[format](sae, out, provenance)
    elif is_ours:
        copy_sae(sae_folder(folder), out, provenance)
    else:
        save_sae(sae, out, provenance)
    copy_files(sorted((folder / "figures").glob("*.png")), out / "figures")
    write_atomically(out / "README.md", write_card(sae, provenance, folder, format, written_as).encode())
    return [
        file
        for file, inode in inodes(out).items()
        if before.get(file) != inode or (written_as and file.suffix == ".safetensors")
    ]


def is_large(folder: Path) -> bool:
    """Return whether an SAE folder of ours has more than LARGE bytes of weights."""
    place = sae_folder(folder)
    return sum((place / name).stat().st_size for name in weight_files(place)) > LARGE


def export_dashboards(
    source: str | Path,
    sae_id: str | None,
    sae: BaseSAE,
    data: ActivationData,
    latents: Int[Tensor, " c"],
    format: str,
    out: Path,
    names: Names,
    sizes: Mapping[str, int],
) -> list[Path]:
    """Write what the chosen latents of an SAE respond to and promote, and a card, into `out` (see `write_dashboards`).

    Returns:
        The files that were written.

    Raises:
        UserError: the errors of `write_dashboards`.
    """
    folder = folder_of(source, sae_id)
    provenance, before = provenance_of(folder), inodes(out)
    place = write_dashboards(sae, data, latents, format, out, provenance, names, **sizes)
    write_atomically(out / "README.md", write_dashboards_card(sae, provenance, folder, format, place).encode())
    return [file for file, inode in inodes(out).items() if before.get(file) != inode]


def check_format(format: str) -> None:
    """Raise a UserError unless something here writes the format."""
    known = (*WRITERS, OURS, *DASHBOARDS)
    if format not in known:
        raise UserError(f"format={format} is not known: choose one of {', '.join(known)}.")


def folder_of(source: str | Path, sae_id: str | None) -> Path:
    """Return the folder that an SAE's source names, which need not exist: it may be on the hub."""
    return Path(source).expanduser() / (sae_id or "")


def is_of_this_library(folder: Path) -> bool:
    """Return whether a folder is a run or an SAE of this library."""
    if (folder / ".hydra").is_dir():
        return True
    return any((place / CONFIG).is_file() and holds_weights(place) for place in (folder, folder / "sae"))


def provenance_of(folder: Path) -> dict[str, Any]:
    """Return the provenance of an SAE of this library, without secrets and folders; empty for any other."""
    if not is_of_this_library(folder):
        return {}
    provenance: dict[str, Any] = public(read_json(sae_folder(folder) / CONFIG)["provenance"])
    return provenance


def inodes(folder: Path) -> dict[Path, int]:
    """Return the files at or below a folder, without symbolic links, with their inodes: an atomic write changes it."""
    return {file: file.stat().st_ino for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()}


def copy_files(files: list[Path], folder: Path) -> None:
    """Copy those of the files that exist into `folder`."""
    for file in files:
        if file.is_file():
            write_atomically(folder / file.name, file.read_bytes())


def describe_upload(folder: Path, files: list[Path], repository: str, private: bool) -> str:
    """Return what `push_to_hub` would send, as text: each file with its size."""
    sizes = [f"{file.stat().st_size:>15,} bytes  {file.relative_to(folder).as_posix()}" for file in files]
    created = "private" if private else "public"
    return "\n".join([f"To {repository}, {created} if it is created now, go {len(files)} files:", *sizes])


def push_to_hub(folder: Path, files: list[Path], repository: str, private: bool) -> str:
    """Upload files of a folder to the hub, and nothing else. Creates the repository if it does not exist.

    Args:
        files: what to send (see `describe_upload`).
        private: create a private repository. An existing repository keeps its visibility.

    Returns:
        The URL of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses. The local folder is kept.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    refused = (
        f"{folder} is written, but was not pushed to {repository} ({{reason}}): log in with `hf auth login`, then type "
        "the same command again."
    )
    with hub_errors(refused):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        added = [CommitOperationAdd(file.relative_to(folder).as_posix(), str(file)) for file in files]
        return str(api.create_commit(repository, added, commit_message="Add an SAE").commit_url)
