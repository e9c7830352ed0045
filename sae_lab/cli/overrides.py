"""Explain why Hydra cannot read or compose the overrides of a command, in one sentence that says what to type."""

import difflib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from sae_lab.cli.help import CONF, PACKAGE

HYDRA = Path(hydra.__file__).parent

SENTENCES = {
    r"Sweep parameters '(.*)' requires": "{0} is a sweep: add -m to the command.",
    r"Sweeping over Hydra's configuration is not supported : '(.*)'": "{0} cannot be a sweep: give it one value.",
    r"Ambiguous value for argument '(.+?)=(.*?)' 1\.": "{0}={1} has several values: add -m to sweep over them, or type "
    "'{0}=[{1}]' for a list.",
    r"An item is already at '(.*?)'": "{0} is in the config already: leave out the + before it.",
    r"Could not delete from config. '(.*)' does not exist": "~{0} removes nothing: the config has no key {0}.",
    r"Could not delete from config. The value of '(.*)' is (.*) and not (.*)\.": "~{0}={2} removes nothing: type ~{0}.",
    r"Could not delete '(.*)'. No match": "~{0} removes nothing: the command has no such choice.",
    r"Could not override ''": "an override begins with =: type KEY=VALUE.",
    r"Could not override '(\S*)'\. No match in the defaults": "this command has no choice of {0}: leave it out, or "
    "see --help for those that it has.",
    r"Multiple values for (\S+)\. ": "{0} is given two choices: leave out the + before it.",
    r"looks like a config group override, but config group '(.*)' does not": "{0} is not a group of choices: leave out "
    "what follows its @, or see --help.",
    r"force-add of config groups is not supported: '\+?\+?(.*)'": "{0} is a choice: leave out the ++ before it.",
    r"You must specify '(\S+?)'": "{0} needs a choice: {choices}.",
    r"Error merging override (.*)": "{0} does not fit there: give a value of the same kind as `--cfg job` or "
    "`--cfg hydra` prints.",
}
"""Messages of Hydra, and what to say instead of them."""


def explain_override(error: BaseException, overrides: Sequence[str]) -> str | None:
    """Return one sentence about an error of Hydra or OmegaConf that an override caused; None for other errors."""
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    message = " ".join(str(error).split())
    if isinstance(error, HydraException):
        if unknown := re.search(
            r"Could not (?:find|load) '(.*?)'(?:\.| Available options in '(.*?)': (.*?))(?: Config|$)", message
        ):
            group = unknown[2] or unknown[1].partition("/")[0]
            return unknown_choice(group, unknown[1].removeprefix(f"{group}/"), (unknown[3] or "").split())
        for pattern, sentence in SENTENCES.items():
            if found := re.search(pattern, message):
                return sentence.format(*found.groups(), choices=list_choices(found[1]) if found.groups() else "")
    if isinstance(error, OmegaConfBaseException | RecursionError):
        return misplaced(error, overrides)
    return of_wrong_type(overrides) or being_applied(error) if raised_in_hydra(error) else None


def unreadable(override: str) -> str:
    """Return the sentence about an override that does not follow Hydra's grammar."""
    override = override.removeprefix("++")
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is not a setting: type {override.lstrip('+~') or 'KEY'}=VALUE."
    if not key.strip():
        return f"{override} has no key: type KEY{override.strip()}."
    if value.endswith(","):
        return f"{override} ends in a comma: leave it out, or add -m and another value to sweep over both."
    quoted = value.replace('"', '\\"')
    return (
        f"{override} cannot be read: close its brackets and quotes or, for a string, type '{key.strip()}=\"{quoted}\"'."
    )


def unknown_choice(group: str, choice: str, options: Sequence[str]) -> str:
    """Return the sentence about a choice that its group does not have."""
    known = [option for option in options if not option.startswith("_")] or choices_of(group)
    close = difflib.get_close_matches(choice, known, n=1)
    hint = f"did you mean {close[0]}? It" if close else "it"
    return f"{group}={choice} is not known: {hint} must be one of {', '.join(known)}."


def of_wrong_type(overrides: Sequence[str]) -> str | None:
    """Return the sentence about the first override of a kind that breaks Hydra; None if there is none."""
    for override in filter(None, map(parse, overrides)):
        if not override.key_or_group:
            return f"{override.input_line} has no key: type KEY{override.input_line}."
        if override.key_or_group.startswith("hydra.") and not isinstance(override.value(), str):
            return f"{override.input_line} does not fit there: `--cfg hydra` prints what Hydra takes."
        if (known := choices_of(override.key_or_group)) and override.value() not in known:
            group = override.key_or_group
            return f"{override.input_line} names no choice of {group}: type {group}=NAME, one of {', '.join(known)}."
    return None


def being_applied(error: BaseException) -> str | None:
    """Return the sentence about the override that Hydra was applying when the error arose; None if it was at none."""
    found = [frame.f_locals.get("override") for frame, _ in traceback.walk_tb(error.__traceback__)]
    applied = [override for override in found if isinstance(override, Override)]
    return f"{applied[-1].input_line} does not fit there: `--cfg job` prints what is there." if applied else None


def misplaced(error: OmegaConfBaseException | RecursionError, overrides: Sequence[str]) -> str | None:
    """Return the sentence about an interpolation that cannot be resolved, or about a key that was taken away."""
    key = getattr(error, "full_key", None)
    if isinstance(error, RecursionError):
        typed = next((o for o in overrides if "${" in o), None)
        return None if typed is None else f"{typed} refers to itself: give a value."
    reason = str(error).strip().splitlines()[0]
    if isinstance(error, InterpolationResolutionError) or "nterpolation" in reason or "${" in reason:
        typed = next((o for o in overrides if "${" in o and (not key or o.lstrip("+~").startswith(f"{key}="))), key)
        return f"{typed} cannot be resolved ({reason}): correct what stands in ${{...}}, or give a value."
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and key:
        removals = (o for o in overrides if f"{key}.".startswith(f"{o.lstrip('~').partition('=')[0]}."))
        taken = next(removals, None)  # without one, a command reads a key that no config has: a bug
        return None if taken is None else f"{key} is not in the config: leave out {taken}."
    return f"{key}: {reason}" if key else reason


def raised_in_hydra(error: BaseException) -> bool:
    """Return whether the error arose in Hydra's own code, or in what that calls while it composes the config."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [i for i, file in enumerate(files) if file.startswith(str(PACKAGE))]
    return any(Path(file).parent == HYDRA / "_internal" for file in files[ours[-1] if ours else 0 :])


def parse(override: str) -> Override | None:
    """Parse an override; None if it does not follow Hydra's grammar, or is a flag."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def choices_of(group: str) -> list[str]:
    """Return the choices of a group of conf/, without fragments such as `_linear`; none if it is no group."""
    files = sorted((CONF / group).rglob("*.yaml")) if re.fullmatch(r"[\w/]+", group) else []
    return [f.relative_to(CONF / group).with_suffix("").as_posix() for f in files if not f.name.startswith("_")]


def list_choices(group: str) -> str:
    return ", ".join(choices_of(group))
