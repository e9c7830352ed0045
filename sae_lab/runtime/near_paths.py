"""What a path that is not there may have meant, for the sentence about it."""

import difflib
import re
from pathlib import Path

OURS = ("outputs", "multirun")
"""Folders that runs and sweeps are in, if nothing else is typed."""
SHOWN = 5


def is_path(name: str) -> bool:
    """Return whether a name can only be a path: one of the hub is `owner/name`, of letters, digits and `_.-`."""
    return not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.split("/")[0] in OURS


def no_such_path(name: str) -> str:
    """Return the sentence about an SAE or a run that is not there."""
    return f"there is no folder or file {name}: {meant(name, 'give the folder of a run or of an SAE.')}"


def meant(name: str, otherwise: str) -> str:
    """Return which path may have been meant by one that is not there, or which there are; else another advice."""
    path = Path(name).expanduser()
    there = next(folder for folder in (path, *path.parents) if folder.exists() or folder == folder.parent)
    if near := nearest(there, path.relative_to(there).parts):
        return f"did you mean {near}?"
    folders = [entry.name for entry in entries(there) if entry.is_dir()] if there.name else []
    if not folders or there == path:
        return otherwise
    more = f" and {len(folders) - SHOWN} more" if len(folders) > SHOWN else ""
    return f"{there} has {', '.join(folders[:SHOWN])}{more}."


def nearest(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """Return the path below a folder whose parts are most like these; None if one is like none there."""
    for part in parts:
        names = [entry.name for entry in entries(folder)]
        close = [part] if part in names else difflib.get_close_matches(part, names, n=1)
        if not close:
            return None
        folder /= close[0]
    return folder


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, by name, but for hidden entries; nothing if it cannot be read."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []
