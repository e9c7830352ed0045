"""Where the results of an SAE and of a comparison go, and what they are called."""

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_lab.runs.config import config_file
from sae_lab.runs.folder import check_links
from sae_lab.runs.replacements import LONGEST
from sae_lab.runtime.errors import UserError

OUTPUTS = Path("outputs")


def is_run(source: str | Path, sae_id: str | None = None) -> bool:
    """Return whether the source is a run folder, and not an SAE in it."""
    return not sae_id and config_file(Path(source)).is_file()


def name_of(source: str | Path, sae_id: str | None) -> str:
    """Return a name for an SAE that is a file or folder name, too."""
    path = Path(source).expanduser()
    parts = [path.resolve().name if path.exists() else str(source), *([sae_id] if sae_id else [])]
    return as_file_name("_".join(parts))


def as_file_name(text: str) -> str:
    """Return text with "_" for what a file name should not have."""
    return re.sub(r"[^\w.=-]+", "_", text, flags=re.ASCII)


def home_of(source: str | Path, sae_id: str | None) -> Path:
    """Return the folder below which all results of an SAE go: the run folder, or that of an SAE that is no run."""
    return Path(source) if is_run(source, sae_id) else results_folder(source, sae_id)


def results_folder(source: str | Path, sae_id: str | None) -> Path:
    """Return the folder of results for an SAE that is no run: `results` in its folder, or beside its file.

    It is in outputs/ for an SAE on the hub, or in a folder that may not be written.
    """
    path = Path(source).expanduser() / (sae_id or "")
    elsewhere = OUTPUTS / name_of(source, sae_id)
    if path.is_file():
        return path.with_name(f"{path.name}_results") if os.access(path.parent, os.W_OK) else elsewhere
    return path / "results" if path.is_dir() and os.access(path, os.W_OK) else elsewhere


def distinct_names(sources: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return a name for each SAE: its folder, with as many of the folders above as tell the names apart."""
    paths = [(*Path(source).parts, *Path(sae_id or "").parts) for source, sae_id in sources]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path)} ({i})" for i, path in enumerate(paths)]


def places(sources: Mapping[str, tuple[str, str | None]]) -> dict[str, list[str | None]]:
    """Return where the SAEs of a comparison are, by their names: a path in full, and the id."""
    return {
        name: [str(Path(source).resolve()) if Path(source).exists() else source, sae_id]
        for name, (source, sae_id) in sources.items()
    }


def comparison_folder(sources: Mapping[str, tuple[str, str | None]]) -> Path:
    """Return the folder of a comparison: by the names of the SAEs, and a checksum of where they are."""
    where = [*map(tuple, places(sources).values())]
    return OUTPUTS / "compare" / f"{as_file_name('-'.join(sources))[:LONGEST]}-{zlib.crc32(repr(where).encode()):08x}"


def prepare_folder(folder: Path) -> Path:
    """Make the folder of results, if it is not there.

    Raises:
        UserError: it is a file, or holds a link out of it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder)
    return folder
