"""Names of a sweep's job folders, made from the overrides of each job."""

import re
import zlib


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
