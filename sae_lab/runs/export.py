"""Export a run's SAE in the files of this or another library, with figures and a model card; push it to the hub."""

import json
from pathlib import Path

from sae_lab.interop.load import FORMATS, load_sae
from sae_lab.runs.card import write_card
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.hub import hub_errors
from sae_lab.saes.files import CONFIG, PROBE, WEIGHTS, sae_folder

OURS = "sae_lab"


WRITERS = {name: format.write for name, format in FORMATS.items() if hasattr(format, "write")}


def export_run(run_dir: Path, format: str, out: Path) -> list[Path]:
    """Write the run's SAE, its figures and a model card into `out`. Returns the files.

    Raises:
        UserError: the format is unknown, the run has no SAE, or the format cannot express it.
    """
    if format not in (*WRITERS, OURS):
        raise UserError(f"format={format} is not known: choose one of {', '.join((*WRITERS, OURS))}.")
    source = sae_folder(run_dir)
    sae = load_sae(source)
    description = json.loads((source / CONFIG).read_text())
    sae_id = None
    if format == OURS:
        copy_files([source / name for name in (CONFIG, WEIGHTS, PROBE)], out)
    else:
        sae_id = WRITERS[format](sae, out, description["provenance"])
    copy_files(sorted((run_dir / "figures").glob("*.png")), out / "figures")
    write_atomically(out / "README.md", write_card(sae, description["provenance"], run_dir, format, sae_id).encode())
    return sorted(path for path in out.rglob("*") if path.is_file())


def copy_files(files: list[Path], folder: Path) -> None:
    """Copy those of the files that exist into `folder`."""
    for file in files:
        if file.is_file():
            write_atomically(folder / file.name, file.read_bytes())


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder to the hub and return its URL. Creates the repository if it does not exist.

    Args:
        private: create a private repository. An existing repository keeps its visibility.

    Raises:
        UserError: the hub cannot be reached or refuses. The local folder is kept.
    """
    from huggingface_hub import HfApi

    refused = (
        f"{folder} is written, but was not pushed to {repository} ({{reason}}): log in with `hf auth login` and type "
        f"`hf upload {repository} {folder}{' --private' if private else ''}`."
    )
    with hub_errors(refused):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
