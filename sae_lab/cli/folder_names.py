"""Names of a sweep's job folders: the overrides of the job, as one folder of a length that disks take."""

import re
import zlib


# Job folders are named by their overrides, which may hold paths: a name must stay one folder, of a length disks take.
def folder_name(overrides: str) -> str:
    """The folder of a sweep's job: its overrides, but for those that may differ when it is continued."""
    from sae_lab.runs.folder import MAY_CHANGE  # here: it takes torch along

    parts = split_overrides(overrides)
    free = tuple(f"{key}{end}" for key in MAY_CHANGE for end in "=.")
    name = ",".join([part for part in parts if not part.lstrip("+").startswith(free)] or parts).replace("/", "_")
    return name if len(name) <= 200 else f"{name[:191]}-{zlib.crc32(name.encode()):08x}"


def split_overrides(name: str) -> list[str]:
    """["k=8", "lm.sites=[a,b]"] of `k=8,lm.sites=[a,b]`."""
    return re.split(r",(?=[+~]*[\w.@/]+=)", name)
