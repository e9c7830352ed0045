"""Names of folders: a new one for each command, and a sweep's job folders, named by the overrides of each job."""

import itertools
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from sae_lab.cli.refused import remember_as_found
from sae_lab.runtime.errors import UserError

log = logging.getLogger(__name__)


def started_with_others() -> bool:
    """Return whether torchrun or srun started this process. parallel/environment.py reads the variables."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ


def new_folder(path: str) -> str:
    """Create a folder and return its path, with -2, -3, ... at the end if there is one of that name.

    Commands that start in the same second get the same name from the time; only one of them can create the folder.
    Processes that torchrun or srun started together get the folder of rank 0.
    """
    if started_with_others():
        from sae_lab.parallel.environment import ask_rank_0  # imported here, because it imports torch

        return ask_rank_0(lambda: create_folder(path))
    return create_folder(path)


def create_folder(path: str) -> str:
    """Create the folder of new_folder, and return its path."""
    for number in itertools.count(1):
        name = path if number == 1 else f"{path}-{number}"
        if not Path(name).exists():
            remember_as_found(Path(name))
        try:
            Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError


def folder_name(overrides: str) -> str:
    """Return the folder name of a sweep's job: its overrides, but for those that `leave_out_constants` leaves out.

    Slashes are replaced, because a name must be one folder. Names above 200 characters are cut, and end in a checksum.
    """
    name = overrides.replace("/", "_")
    return name if len(name) <= 200 else f"{name[:191]}-{zlib.crc32(name.encode()):08x}"


def split_overrides(name: str) -> list[str]:
    """Split a folder name into overrides: `k=8,lm.sites=[a,b]` into ["k=8", "lm.sites=[a,b]"]."""
    return re.split(r",(?=[+~]*[\w.@/]+=)", name)


EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"


def leave_out_constants(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a sweep, with the one that leaves settings with a single value out of its jobs' names.

    Those that may change when a job is resumed are left out of any sweep. The others only in a new folder, or in one
    whose jobs have such names and these settings: the jobs of a sweep of before keep their names, and one folder may
    hold sweeps that differ in these settings. What is swept over is always in the names, so that no two jobs share one.
    """
    typed = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if not {"-m", "--multirun"} & {*arguments} or any(argument.startswith(EXCLUDED) for argument in typed):
        return [*arguments]
    try:
        parsed = [o for o in OverridesParser.create().parse_overrides(typed) if not o.is_hydra_override()]
    except HydraException:  # explained where Hydra parses them
        return [*arguments]
    constant = [o for o in parsed if not o.is_sweep_override()]
    free = [o for o in constant if may_change(o)]
    lines = [as_listed(o) for o in constant if o not in free]
    folder = next((a.partition("=")[2] for a in typed if a.startswith("hydra.sweep.dir=")), None)
    short = len(constant) < len(parsed) and not any(o.is_sweep_override() and o.is_delete() for o in parsed)
    if short and folder is not None and Path(folder).exists():
        short = names_leave_out(Path(folder), lines)
    left_out = constant if short else free
    if not left_out or len(left_out) == len(parsed):
        return [*arguments]
    keys = ",".join(f"'{o.key_or_group}'" for o in left_out)
    return [*arguments, f"{EXCLUDED}=[{keys}]"]


def may_change(override: Override) -> bool:
    """Return whether an override sets a key that may change when a run is resumed."""
    from sae_lab.runs.folder import MAY_CHANGE  # imported here, because it imports torch

    return not override.is_delete() and f"{override.key_or_group}.".startswith(tuple(f"{key}." for key in MAY_CHANGE))


def as_listed(override: Override) -> str:
    """Return an override as a sweep lists it for its jobs: `n_tokens=60_000` as `n_tokens=60000`."""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def names_leave_out(sweep_dir: Path, overrides: Sequence[str]) -> bool:
    """Return whether a job of a sweep has all these overrides, and a name without them.

    Warns if no job has them, and one has a name without their keys: no job that is there is continued.
    """
    jobs = [*named_and_listed(sweep_dir)]
    same = [named for named, listed in jobs if {*overrides} <= {*listed}]
    if not same:
        keys = {key_of(override) for override in overrides}
        short = (listed for named, listed in jobs if not keys & {key_of(override) for override in named})
        if others := next(short, None):
            warn_of_others(sweep_dir, [o for o in overrides if o not in others], others)
    return any(not {*named} & {*overrides} for named in same)


def named_and_listed(sweep_dir: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the overrides in the name of each job of a sweep, and all that it has."""
    from sae_lab.runs.config import read_yaml  # imported here, because it imports torch

    for file in sorted(sweep_dir.glob("*/.hydra/overrides.yaml")):
        with suppress(UserError):  # the file is damaged
            if isinstance(listed := read_yaml(file), list):
                yield split_overrides(file.parent.parent.name), [str(override) for override in listed]


def warn_of_others(sweep_dir: Path, ours: Sequence[str], listed: Sequence[str]) -> None:
    """Warn that the jobs of a folder have other overrides than `ours`, and say what continues them."""
    theirs = [o for o in listed if key_of(o) in map(key_of, ours)]
    has = f"jobs with {', '.join(theirs)}" if theirs else f"jobs without {', '.join(map(key_of, ours))}"
    again = f"type {' '.join(theirs)}" if theirs else "leave it out"
    log.warning(
        f"{sweep_dir} holds {has}, so the jobs of this sweep, with {', '.join(ours)}, get folders of their own there: "
        f"{again} to continue those, or type another hydra.sweep.dir to start anew."
    )


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0]
