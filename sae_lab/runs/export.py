"""Export a run's SAE in the files of this or another library, with figures and a model card; push it to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.interop.load import FORMATS, load_sae
from sae_lab.runs.card import write_card, write_dashboards_card
from sae_lab.runs.dashboards import DASHBOARDS, Names, write_dashboards
from sae_lab.runs.digests import SAE, check_unaltered
from sae_lab.runs.folder import check_links
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_json, write_atomically
from sae_lab.runtime.hub import hub_errors
from sae_lab.runtime.private import public
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import CONFIG, copy_sae, sae_folder

OURS = "sae_lab"
WRITERS = {name: format.write for name, format in FORMATS.items() if hasattr(format, "write")}


def export_run(run_dir: Path, format: str, out: Path) -> list[Path]:
    """Write the run's SAE, its figures and a model card into `out`, without secrets and folders (runtime/private.py).

    Returns:
        The files of the export: what was written, and weights that earlier exports of other layers left in `out`.

    Raises:
        UserError: the format is unknown, the run has no SAE, or the format cannot express it.
    """
    check_format(format)
    check_links(run_dir)
    check_unaltered(run_dir, SAE)
    source, before = sae_folder(run_dir), inodes(out)
    sae = load_sae(source)
    provenance = provenance_of(run_dir)
    sae_id: str | None = None
    if format == OURS:
        copy_sae(source, out, provenance)
    else:
        sae_id = WRITERS[format](sae, out, provenance)
    copy_files(sorted((run_dir / "figures").glob("*.png")), out / "figures")
    write_atomically(out / "README.md", write_card(sae, provenance, run_dir, format, sae_id).encode())
    return [
        file
        for file, inode in inodes(out).items()
        if before.get(file) != inode or (sae_id and file.suffix == ".safetensors")
    ]


def export_dashboards(
    run_dir: Path,
    sae: BaseSAE,
    data: ActivationData,
    latents: Int[Tensor, " c"],
    format: str,
    out: Path,
    names: Names,
    sizes: Mapping[str, int],
) -> list[Path]:
    """Write what the chosen latents of a run respond to and promote, and a card, into `out` (see `write_dashboards`).

    Returns:
        The files that were written.

    Raises:
        UserError: the errors of `write_dashboards`.
    """
    provenance, before = provenance_of(run_dir), inodes(out)
    place = write_dashboards(sae, data, latents, format, out, provenance, names, **sizes)
    write_atomically(out / "README.md", write_dashboards_card(sae, provenance, run_dir, format, place).encode())
    return [file for file, inode in inodes(out).items() if before.get(file) != inode]


def check_format(format: str) -> None:
    """Raise a UserError unless something here writes the format."""
    known = (*WRITERS, OURS, *DASHBOARDS)
    if format not in known:
        raise UserError(f"format={format} is not known: choose one of {', '.join(known)}.")


def provenance_of(run_dir: Path) -> dict[str, Any]:
    """Return the provenance of a run's SAE, without secrets and folders."""
    provenance: dict[str, Any] = public(read_json(sae_folder(run_dir) / CONFIG)["provenance"])
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
