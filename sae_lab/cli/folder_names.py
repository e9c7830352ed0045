"""Names of folders: a new one for each command, and a sweep's job folders, named by the overrides of each job."""

import itertools
import re
import zlib
from pathlib import Path


def new_folder(path: str) -> str:
    """Create a folder and return its path, with -2, -3, ... at the end if there is one of that name.

    Commands that start in the same second get the same name from the time; only one of them can create the folder.
    """
    for number in itertools.count(1):
        name = path if number == 1 else f"{path}-{number}"
        try:
            Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError


def folder_name(overrides: str) -> str:
    """Return the folder name of a sweep's job: its overrides, without those that may change on resume.

    Slashes are replaced, because a name must be one folder. Names above 200 characters are cut, and end in a checksum.
    """
    from sae_lab.runs.folder import MAY_CHANGE  # imported here, because it imports torch

    parts = split_overrides(overrides)
    free = tuple(f"{key}{end}" for key in MAY_CHANGE for end in "=.")
    name = ",".join([part for part in parts if not part.lstrip("+").startswith(free)] or parts).replace("/", "_")
    return name if len(name) <= 200 else f"{name[:191]}-{zlib.crc32(name.encode()):08x}"


def split_overrides(name: str) -> list[str]:
    """Split a folder name into overrides: `k=8,lm.sites=[a,b]` into ["k=8", "lm.sites=[a,b]"]."""
    return re.split(r",(?=[+~]*[\w.@/]+=)", name)
