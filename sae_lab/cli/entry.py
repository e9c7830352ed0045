"""What every entry point shares: where conf/ lies, what `--help` shows, and a mistake as one sentence."""

import difflib
import functools
import os
import re
import signal
import sys
import textwrap
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from sae_lab.runtime.checks import checked_number
from sae_lab.runtime.errors import Interrupted, UserError


# Job folders are named by their overrides, which may hold paths: a name must stay one folder, of a length disks take.
def folder_name(overrides: str) -> str:
    """The folder of a sweep's job: its overrides, but for those that may differ when it is continued."""
    from sae_lab.runs.folder import FREE  # here: it takes torch along

    parts = each_override(overrides)
    free = tuple(f"{key}{end}" for key in FREE for end in "=.")
    name = ",".join([part for part in parts if not part.lstrip("+").startswith(free)] or parts).replace("/", "_")
    return name if len(name) <= 200 else f"{name[:191]}-{zlib.crc32(name.encode()):08x}"


def each_override(name: str) -> list[str]:
    """["k=8", "lm.sites=[a,b]"] of `k=8,lm.sites=[a,b]`."""
    return re.split(r",(?=[+~]*[\w.@/]+=)", name)


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


# What `--help` shows. Hydra's own lists every group, for an entry point that takes none of them too, and the fragments
# that choices share (`_linear`), which nobody is to choose.
def choices(config_name: str, *more: str) -> str:
    """The groups that an entry point's config names, and more of them, each with what it may be."""
    named = [next(iter(d)) for d in OmegaConf.load(conf_file(config_name)).defaults if d != "_self_"]
    groups = [*sorted(g for g in named if not g.startswith("override")), *more]
    lines = [
        textwrap.fill(f"{group}: {', '.join(options(group))}", 96, initial_indent="  ", subsequent_indent="      ")
        for group in groups
    ]
    return "\n".join(["Choices (name=choice)", *lines]) if lines else ""


def options(group: str) -> list[str]:
    """What a group may be, then what the groups inside it may be, as one types it: `matched/topk`."""
    loader = GlobalHydra.instance().config_loader()
    inner = sorted(loader.get_group_options(group, ObjectType.GROUP))
    nested = [f"{name}/{option}" for name in inner for option in options(f"{group}/{name}")]
    return [o for o in sorted(loader.get_group_options(group, ObjectType.CONFIG)) if o[0] != "_"] + nested


def dials(config_name: str) -> str:
    """An entry point's config as it is written, comments included, without what only Hydra reads."""
    text = re.sub(r"\n(#.*\n)*hydra:\n(.*\n)*", "", conf_file(config_name).read_text())
    text = re.sub(r"^defaults:\n( .*\n)+", "", text, flags=re.MULTILINE)
    return text.strip().replace("$", "$$")  # Hydra fills what it shows into a template


def conf_file(config_name: str) -> Path:
    return CONF / f"{config_name}.yaml"


OmegaConf.register_new_resolver("choices", choices, replace=True)
OmegaConf.register_new_resolver("dials", dials, replace=True)

# What a preset of conf/hydra/ is built on, and the extra of this package that installs it.
EXTRAS = {"launcher/ray": "ray", "launcher/submitit_slurm": "slurm", "sweeper/optuna": "optuna"}

# How a command that was stopped goes on; the others start anew.
CONTINUES = {"train": ": the same command{} continues", "harvest": ": the same command continues"}
_dial = ""

PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel carries conf/ inside the package; a checkout keeps it at the top.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main` over conf/, with mistakes told in one sentence on stderr and exit code 1.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[Exception] = []

        def job(cfg: DictConfig) -> Any:
            """The task; outside a multirun its exception is kept from Hydra, which would print a line of its own."""
            sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
            if not sweeping:
                works_in(f"hydra.run.dir={HydraConfig.get().run.dir}")
            try:
                return task(cfg)
            except Exception as e:
                if sweeping:
                    raise
                failures.append(e)

        hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)

        def run() -> None:
            hydra_main()
            if failures:
                raise failures[0]

        @functools.wraps(task)
        def main() -> None:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                run()
                return
            signal.signal(signal.SIGTERM, _terminated)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the sentence is ours to write
            try:
                run()
            except Interrupted as e:
                _leave(f"{e}{CONTINUES.get(config_name, '').format(_folder())}.", e.exit_code)
            except KeyboardInterrupt:
                _leave("Interrupted.", 130)
            except Exception as e:
                sentence = explain(e, config_name, sys.argv[1:])
                if sentence is None:
                    raise
                _leave(f"{Path(config_name).name}: {sentence}", 1)

        return main

    return decorate


def whole_numbers(cfg: DictConfig, least: Mapping[str, int]) -> None:
    """Make ints of some keys, and refuse what is no whole number or less than it must be at least."""
    for name, bound in least.items():
        OmegaConf.update(cfg, name, checked_number(name, OmegaConf.select(cfg, name), bound, whole=True))


def folder_of(cfg: DictConfig, key: str) -> Path:
    """The folder that a key names.

    Raises:
        UserError: it names none.
    """
    if not isinstance(cfg[key], str):
        raise UserError(f"{key}={'null' if cfg[key] is None else cfg[key]} must be the path of a folder.")
    return Path(cfg[key])


def works_in(dial: str) -> None:
    """Remember the override that leads a command into the folder in which this one works."""
    global _dial
    _dial = dial


def _folder() -> str:
    """That override, where the command has none: the default folder bears the time at which a command starts."""
    key = _dial.partition("=")[0]
    return "" if not key or any(argument.startswith(f"{key}=") for argument in sys.argv) else f" with {_dial}"


def _terminated(signum: int, frame: Any) -> None:
    """SIGTERM outside training (which saves a checkpoint first, see interrupt.py)."""
    raise Interrupted("Stopped by SIGTERM", signum)


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def explain(error: BaseException, config_name: str, overrides: list[str]) -> str | None:
    """One sentence for a user's mistake; None for anything else (a bug keeps its traceback)."""
    chain = list(_causes(error))
    for e in chain:
        if isinstance(e, UserError):
            return str(e)
    for e in chain:
        if isinstance(e, MissingMandatoryValue):
            key = e.full_key or _one_line(e)
            return f"{key} has no value: give {key}=..."
        if isinstance(e, InterpolationKeyError):
            return _one_line(e)
        missing = re.search(r"In 'hydra/(.*?)': Could not (?:find|load) 'hydra/(.*?)'", str(e))
        if missing and missing[2] in EXTRAS:
            preset = missing[1].replace("/", "=", 1)
            return f"hydra/{preset} needs a package that is not installed: pip install 'sae-lab[{EXTRAS[missing[2]]}]'."
        unknown = re.search(r"Could not override '([^']+)'", str(e))
        if unknown:
            return _unknown_key(unknown[1], config_name, overrides)
        if isinstance(e, FileExistsError | NotADirectoryError | PermissionError) and e.filename:
            return f"{e.filename} cannot be written ({e.strerror}): choose another path."
        if isinstance(e, ValueError) and str(e) == "No trials are completed yet.":  # Optuna, which ends its search so
            return "no job of this search was completed: their failed.txt say why; the same command tries them again."
        if str(e).startswith("Config group override must be"):
            return "a config group was given null: name one of its choices, which --help lists."
    if isinstance(error, InstantiationException):
        return _unknown_argument(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(error)
    return None


def _unknown_argument(error: InstantiationException) -> str | None:
    """A key that the `_target_` does not take (added with +, or missing); any other failure inside it is a bug."""
    message = _one_line(error)
    if missing := re.search(r"Error locating target '(.*?)'.*full_key: (\S+)", message):
        return f"{missing[2]}._target_={missing[1]} cannot be imported: correct that name."
    wrong = re.search(r"TypeError\((.*(unexpected keyword argument|missing \d+ required).*?)\)", message)
    return f"{wrong[1].strip(chr(34))}: correct that key." if wrong else None


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).partition("Config search path:")[0].split())


def _unknown_key(key: str, config_name: str, overrides: list[str]) -> str:
    """Names the keys that stand where the unknown one was looked for."""
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
        known = []  # another override is wrong too: the sentence below still names this one
    if leaf in known:  # a sweep composes all of its jobs before the first one starts
        return f"{parent or 'the config'} has no key {leaf} in some jobs of this sweep: sweep those that have it alone."
    close = difflib.get_close_matches(leaf, known, n=1)
    hint = f"did you mean {close[0]}? It" if close else "it"
    listing = f"{hint} has {', '.join(known)}" if known else "`--cfg job` prints every key"
    typed = next((o for o in overrides if o.startswith(f"{key}=")), f"{key}=...")
    return f"{parent or 'the config'} has no key {leaf}: {listing}; +{typed} adds it."
