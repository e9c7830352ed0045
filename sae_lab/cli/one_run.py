"""A sweep on the command line of a command that composes the jobs itself, in one run of Hydra."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

FLAGS = ("-m", "--multirun")


def take_sweep(arguments: Sequence[str]) -> list[str]:
    """Return arguments without `-m`, and with the overrides that have several values as one list, `sweep=[...]`.

    Hydra's own multirun would give the jobs to a launcher, and leave a folder.
    """
    plain = [a for a in arguments if a not in FLAGS]
    parsed = OverridesParser.create().parse_overrides([a for a in plain if not a.startswith("-")])
    several = [o.input_line for o in parsed if o.is_sweep_override() and o.input_line is not None]
    if not several:
        return plain
    quoted = ",".join("'" + one.replace("'", "\\'") + "'" for one in several)
    return [*(a for a in plain if a not in several), f"sweep=[{quoted}]"]
