"""Export a run's SAE in the files of this or another library, with figures and a model card; push it to the hub."""

from pathlib import Path

from sae_lab.interop.load import FORMATS, load_sae
from sae_lab.runs.card import write_card
from sae_lab.runs.digests import SAE, check_unaltered
from sae_lab.runs.folder import check_links
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_json, write_atomically
from sae_lab.runtime.hub import hub_errors
from sae_lab.runtime.private import public
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
    if format not in (*WRITERS, OURS):
        raise UserError(f"format={format} is not known: choose one of {', '.join((*WRITERS, OURS))}.")
    check_links(run_dir)
    check_unaltered(run_dir, SAE)
    source, before = sae_folder(run_dir), inodes(out)
    sae = load_sae(source)
    provenance = public(read_json(source / CONFIG)["provenance"])
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
