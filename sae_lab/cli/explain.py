"""Explain an exception to the user in one sentence."""

import difflib
import re
from collections.abc import Iterator

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sae_lab.cli.help import CONF
from sae_lab.cli.overrides import explain_override
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
    chain = list(_causes(error))
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
            return _unknown_key(unknown[1], config_name, overrides)
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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
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


def _unknown_key(key: str, config_name: str, overrides: list[str]) -> str:
    """Return the sentence about an unknown key, which lists the keys that exist in its place."""
    parent, _, leaf = key.rpartition(".")
    kept = [o for o in overrides if not o.startswith(("-", f"{key}=")) and "," not in o and "=" in o]
    known: list[str] = []
    try:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(config_name, overrides=kept)
        node = OmegaConf.select(config, parent) if parent else config
        known = [str(k) for k in node if not str(k).startswith("_")] if isinstance(node, DictConfig) else []
    except (HydraException, OmegaConfBaseException):
        known = []  # another override is wrong as well; the sentence below still names this key
    if leaf in known:  # a sweep composes all of its jobs before the first one starts
        return f"{parent or 'the config'} has no key {leaf} in some jobs of this sweep: sweep only jobs that have it."
    close = difflib.get_close_matches(leaf, known, n=1)
    hint = f"did you mean {close[0]}? It" if close else "it"
    listing = f"{hint} has {', '.join(known)}" if known else "`--cfg job` prints every key"
    typed = next((o for o in overrides if o.startswith(f"{key}=")), f"{key}=...")
    return f"{parent or 'the config'} has no key {leaf}: {listing}; +{typed} adds it."
