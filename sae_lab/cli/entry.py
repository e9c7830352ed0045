"""Entry point of every command: runs Hydra over conf/, and reports a user's mistake in one sentence."""

import atexit
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sae_lab.cli.closed_output import readers_may_leave
from sae_lab.cli.explain import causes, explain
from sae_lab.cli.folder_names import folder_name, new_folder, started_with_others
from sae_lab.cli.help import CONF, config_text, list_choices
from sae_lab.cli.mixture_parts import parts_of_mixture
from sae_lab.cli.refused import leave_as_found
from sae_lab.cli.share_of_steps import share_of_steps
from sae_lab.cli.unknown_key import check_added
from sae_lab.runtime.errors import Interrupted, UserError
from sae_lab.runtime.near_paths import meant
from sae_lab.runtime.os_errors import AGAIN
from sae_lab.runtime.plain_text import for_terminal
from sae_lab.runtime.signals import raise_interrupted, stopping_signals

OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
# Cached in the config, which Hydra copies with its cache into jobs and processes: so one command makes one folder.
OmegaConf.register_new_resolver("new_folder", new_folder, replace=True, use_cache=True)
OmegaConf.register_new_resolver("choices", list_choices, replace=True)
OmegaConf.register_new_resolver("config_text", config_text, replace=True)
OmegaConf.register_new_resolver("parts_of_mixture", parts_of_mixture, replace=True)
OmegaConf.register_new_resolver("share_of_steps", share_of_steps, replace=True)

# How to continue a stopped command. Commands that are not listed start from the beginning.
CONTINUES = {"train": ": the same command{} continues", "harvest": ": the same command continues"}
_override = ""


def entry_point(
    config_name: str, rewrite: Callable[[Sequence[str]], list[str]] = list
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorate a command with `hydra.main` over conf/.

    A user's mistake ends the command with one sentence on stderr and exit code 1. HYDRA_FULL_ERROR=1 shows the
    traceback instead. A command imports what it needs inside its `main`, so that `--help` takes half a second and not
    the four that torch and Lightning need. `rewrite` returns the arguments of the command line as Hydra gets them.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[Exception] = []

        def job(cfg: DictConfig) -> Any:
            """Run the task. Outside a multirun, keep its exception, because Hydra would print a line of its own."""
            sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
            if not sweeping:
                remember_folder(f"hydra.run.dir={HydraConfig.get().run.dir}")
            try:
                check_added(cfg, config_name, HydraConfig.get().overrides.task)
                return task(cfg)
            except Exception as e:
                if sweeping:
                    raise
                failures.append(e)

        hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)

        def run() -> None:
            check_flags(sys.argv[1:])
            sys.argv[1:] = rewrite(sys.argv[1:])
            hydra_main()
            if failures:
                raise failures.pop()

        @functools.wraps(task)
        def main() -> None:
            atexit.register(gc.freeze)  # else Python searches all that torch imported for cycles: 1.4 s of a processor
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                run()
            else:
                leave_errors_to_us()
                with readers_may_leave():
                    run_or_explain(run, config_name)

        return main

    return decorate


def leave_errors_to_us() -> None:
    """Let a signal, a full disk and a mistake raise what `run_or_explain` says in one sentence."""
    for signum in stopping_signals():
        if signum != signal.SIGINT:  # which stays a KeyboardInterrupt
            signal.signal(signum, raise_interrupted)
    # On a full disk, a line of the log is lost without a traceback: the run says so when it saves.
    logging.raiseExceptions = False
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing


def run_or_explain(run: Callable[[], None], config_name: str) -> None:
    """Run a command; on an interruption or a user's mistake print one sentence and exit."""
    try:
        run()
    except Interrupted as e:
        _leave(f"{e}{CONTINUES.get(config_name, '').format(_folder())}.", e.exit_code)
    except KeyboardInterrupt:
        _leave("Interrupted.", 130)
    except Exception as e:
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(e)):  # an import that was cut short
            _leave("Interrupted.", 130)
        sentence = explain(e, config_name, sys.argv[1:])
        if sentence is None:
            raise
        leave_as_found()
        again = AGAIN + _folder() if "{}" in CONTINUES.get(config_name, "") else AGAIN
        _leave(f"{Path(config_name).name}: {' '.join(sentence.replace(AGAIN, again).split())}", 1)


def check_flags(arguments: Sequence[str]) -> None:
    """Raise a UserError for a flag that Hydra does not have; argparse would print its usage."""
    _, unknown = get_args_parser().parse_known_args(arguments)
    if unknown and not unknown[0].startswith("-"):  # argparse takes settings in one piece
        raise UserError(
            f"{unknown[0]} stands behind an option: put {option_before(unknown[0], arguments)} before all settings."
        )
    if unknown:
        raise UserError(f"{unknown[0]} is not an option: type KEY=VALUE for a setting, or see --help.")
    if {"-m", "--multirun"} & {*arguments} and started_with_others():
        from sae_lab.parallel.environment import place  # imported here, because it imports torch

        if place() is not None:
            raise UserError(
                "torchrun and srun start the processes of one run, not of a sweep: leave them out, and add "
                "trainer.devices=<n> or hydra/launcher=slurm."
            )


def option_before(setting: str, arguments: Sequence[str]) -> str:
    """Return the last option before a setting, with its value."""
    before = arguments[: len(arguments) - 1 - arguments[::-1].index(setting)]
    start = max(i for i, argument in enumerate(before) if argument.startswith("-"))
    return " ".join([before[start], *(argument for argument in before[start + 1 :] if "=" not in argument)])


def folder_from(cfg: DictConfig, key: str) -> Path:
    """Return the folder that the key of a config names.

    Raises:
        UserError: the value is not a string, or there is no such folder.
    """
    if not isinstance(cfg[key], str):
        raise UserError(f"{key}={'null' if cfg[key] is None else cfg[key]} must be the path of a folder.")
    if not Path(cfg[key]).is_dir():
        raise UserError(f"{key}={cfg[key]} is not a folder: {meant(cfg[key], 'correct the path.')}")
    return Path(cfg[key])


def section_from(cfg: DictConfig, key: str) -> DictConfig:
    """Return the part of a config that the key names; raise a UserError if a value stands in its place."""
    section = OmegaConf.select(cfg, key)
    if not isinstance(section, DictConfig):
        raise UserError(f"{key}={section} is in the place of a part of the config: set its keys, {key}.KEY=VALUE.")
    return section


def remember_folder(override: str) -> None:
    """Remember the override with which a command continues in the folder of this one."""
    global _override
    _override = override


def _folder() -> str:
    """Return " with <that override>", or "" if it was typed. Without it, a command gets a new folder named by time."""
    key = _override.partition("=")[0]
    return "" if not key or any(argument.startswith(f"{key}=") for argument in sys.argv) else f" with {_override}"


def _leave(message: str, code: int) -> None:
    """Print a message to stderr, unless a process that was started with this one has done so, and exit."""
    atexit.register(logging.disable, logging.INFO)  # torch logs numbers at exit, where its import was cut short
    if _speaks(message):
        print(for_terminal(message), file=sys.stderr)
    sys.exit(code)


def _speaks(message: str) -> bool:
    """Return whether this process is the one that says a message, among those that were started together."""
    if not started_with_others():
        return True
    for signum in stopping_signals():  # the agent sends one when another process has ended
        signal.signal(signum, signal.SIG_IGN)
    from sae_lab.parallel.environment import first_to_say  # imported here, because it imports torch

    return first_to_say(message)
