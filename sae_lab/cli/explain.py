"""Explain an exception to the user in one sentence."""

import re
from collections.abc import Iterator

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import MissingMandatoryValue

from sae_lab.cli.overrides import explain_override
from sae_lab.cli.unknown_key import unknown_key
from sae_lab.runtime.build import user_mistake
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.os_errors import explain_os_error

TOO_LARGE = (
    r"(?i)out of memory|can't allocate memory|not enough memory|overflow when unpacking|calculation overflowed|"
    r"multiplication overflow|too large to convert|invalid sizes"
)
"""What torch and Python say of a tensor that does not fit."""
# Packages behind the presets of conf/hydra/, each with the extra of this package that installs it.
EXTRAS = {"launcher/ray": "ray", "launcher/submitit_slurm": "slurm", "sweeper/optuna": "optuna"}


def explain(error: BaseException, config_name: str, overrides: list[str]) -> str | None:
    """Return one sentence about a user's mistake; None for anything else, since a bug keeps its traceback."""
    chain = list(causes(error))
    for e in chain:
        if isinstance(e, UserError):
            return str(e)
    for e in chain:
        if isinstance(e, MissingMandatoryValue):
            key = e.full_key or _one_line(e).removeprefix("Missing mandatory value: ")
            return f"{key} has no value: give {key}=..."
        missing = re.search(r"In 'hydra/(.*?)': Could not (?:find|load) 'hydra/(.*?)'", str(e))
        if missing and missing[2] in EXTRAS:
            preset = missing[1].replace("/", "=", 1)
            return f"hydra/{preset} needs a package that is not installed: pip install 'sae-lab[{EXTRAS[missing[2]]}]'."
        unknown = re.search(r"Could not override '([^']+)'\.\nTo append to your config", str(e))
        if unknown:
            return unknown_key(unknown[1], config_name, overrides)
        if isinstance(e, OSError) and _is_cause(e, error) and (refusal := explain_os_error(e)):
            return refusal
        if is_out_of_memory(e):
            return (
                f"not enough memory ({refused_size(e)}): lower what multiplies it, such as n_latents, expansion, "
                "batch_size, data.block_tokens, data.lm_batch_rows or a width of sae.hidden."
            )
        if isinstance(e, ValueError) and str(e) == "No trials are completed yet.":  # raised by Optuna
            return "no job of this search was completed: see each job's failed.txt, then repeat the same command."
    if isinstance(error, InstantiationException):  # from Hydra building a launcher or a sweeper
        mistake = user_mistake(error)
        return None if mistake is None else str(mistake)
    explained = (explain_override(e, overrides) for e in chain)
    if sentence := next((sentence for sentence in explained if sentence), None):
        return sentence
    return _one_line(error) if isinstance(error, HydraException) else None


def refused_size(error: BaseException) -> str:
    """Return the size that could not be allocated, or what else the error says."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    return f"{int(asked[1]) / 2**30:.3g} GiB for one tensor" if asked else first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, or a tensor has more elements than can be counted."""
    named = isinstance(error, RuntimeError | ValueError | OverflowError) and re.search(TOO_LARGE, str(error))
    return bool(named) or isinstance(error, MemoryError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, its cause, the cause of that, and so on. Stops at a cycle, which a re-raised error may make."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _is_cause(suspect: BaseException, error: BaseException | None) -> bool:
    """Return whether an error was raised because of the suspect. One that was handled before is only its context."""
    while error is not None and error is not suspect:
        error = error.__cause__
    return error is suspect


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).partition("Config search path:")[0].split())
