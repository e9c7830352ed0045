"""Random settings for every command, run in this process: each ends in success or in one sentence.

    python tests/fuzz.py FIRST_SEED LAST_SEED

tries one draw per seed, and prints the draws that end in neither.
"""

import contextlib
import io
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from omegaconf import DictConfig
from torch.optim import Optimizer

from sae_lab.cli import entry, refused
from sae_lab.cli.help import CONF, list_choices
from sae_lab.lm.base import LanguageModel
from sae_lab.text.rows import TextRows
from sae_lab.text.store_builder import StoreBuilder
from sae_lab.text.stored_rows import StoredRows

STREAM = ["batch_size=64", "seq_len=16", "data.n_eval_tokens=64"]
BLOCKS = ["data.block_tokens=256", "data.lm_batch_rows=4"]
TINY = {
    "train": [
        *("n_tokens=128", "expansion=2", *STREAM, *BLOCKS, "data.n_val_tokens=64", "calibration_batches=1"),
        *("trainer.validate_every=5", "resume=never", "hydra.run.dir=run"),
    ],
    "harvest": ["cache_dir=harvested", "n_tokens=128", "shard_tokens=64", *STREAM[1:], "data.lm_batch_rows=4"],
    "evaluate": ["run_dir=whole"],
    "features": ["run_dir=whole", "n_latents=4", "n_tokens=64"],
    "export": ["run_dir=whole", "out=exported"],
    "report": ["sweep_dir=whole"],
    "plan": ["out=plan.json"],
    "planted": [
        *("planted.d_in=16", "planted.n_trees=8", "n_latents=32", "batch_size=32", "n_steps=2"),
        "hydra.run.dir=planted",
    ],
    "benchmark": [
        *("d_in=16", "n_latents=64", "k=4", "batch_size=32", "repeats=1"),
        "hydra.run.dir=benchmark",
    ],
    "throughput": [
        *("expansion=2", *STREAM[:2], *BLOCKS, "slice_tokens=128", "slices=1"),
        "hydra.run.dir=throughput",
    ],
}
"""Overrides of each command, in a folder that `prepare` made, with which it takes a second or less."""

WEIGHTS = {"train": 10, "harvest": 2, "planted": 2, "evaluate": 2, "features": 2, "plan": 2}
PLAUSIBLE = [
    "null",
    "true",
    "false",
    "0",
    "1",
    "2",
    "3",
    "4",
    "8",
    "0.5",
    "1.5",
    "100",
    "auto",
    "none",
    "[1]",
    "[16,16]",
]
VALUES = [
    *("null", "true", "false", "''", "abc", "-1", "0", "1", "2", "3.0", "1e30", "-1e30", "nan", "inf", "1.5", "1e-30"),
    *("9" * 30, "9223372036854775807", "1_000_000_000_000", "[]", "[0]", "[0,0]", "[1,2,3]", "[null]", "[abc]"),
    *("{}", "{a: 1}", "x" * 5000, "'été'", "'🦆'", "'a\\nb'", "'[bold]x'", "'{k}'", "'%s'", "'???'", "${oc.env:HOME}"),
    *("'${k}'", "/dev/null", "auto", "no.such.Class", "torch.optim.SGD", "torch.nn.Linear", "sae_lab.train.main", "os"),
]
NOT_DRAWN = {"logger": {"wandb"}}  # starts a process
MANGLED = ["{}=", "{}", "{}=[", "{}={{", "{}=1,2", "{}=a,", "+{}=1", "~{}", "~{}=1", "++{}.x=1", "{}=${{nokey}}", "+{}"]
MANGLED += ["{}='", "={}", "{}==1", "{}=range(1)", "{}=choice(1,2)", "{}=int(a)", "{}@x=1", "{} =1", "{}=${{k", "-{}"]


class Enough(BaseException):
    """Ends a command that has begun to work and would go on for long."""


@dataclass(frozen=True)
class Draw:
    """A command and its overrides."""

    command: str
    overrides: list[str]

    def __str__(self) -> str:
        return f"{self.command} {' '.join(repr(o) if len(o) < 200 else repr(o[:40] + '...') for o in self.overrides)}"


@cache
def keys_of(command: str, *choice: str) -> list[str]:
    """Every key of a command's config, at any depth; with a choice of a group, those that it has there."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        keys = list(keys_below(hydra.compose(command, overrides=list(choice)), ""))
    group = choice[0].partition("=")[0] if choice else "experiment"
    return keys if group == "experiment" else [key for key in keys if key.startswith(f"{group}.")]


def keys_below(node: DictConfig, parent: str) -> Iterator[str]:
    for name in node:
        key = f"{parent}{name}"
        yield key
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from keys_below(child, f"{key}.")


@cache
def groups_of(command: str) -> dict[str, list[str]]:
    """The groups of a command and their choices, as its help lists them."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        listed = list_choices(command).replace("\n      ", " ").splitlines()[1:]
    return {
        group: [c for c in choices.split(", ") if c not in NOT_DRAWN.get(group, ())]
        for group, choices in (line.strip().split(": ") for line in listed)
    }


def draw(seed: int) -> Draw:
    """One to three settings of a command, of any group's choices."""
    rng = random.Random(seed)
    command = rng.choices([*TINY], [WEIGHTS.get(c, 1) for c in TINY])[0]
    groups = groups_of(command)
    chosen = [choose(rng, g, groups[g]) for g in rng.sample([*groups], min(len(groups), rng.choice([0, 0, 1, 1, 2])))]
    choices = [part for parts in chosen for part in parts]
    parts_of_choices = [keys_of(owner(command, parts[0]), parts[0]) for parts in chosen]
    keys = [found for found in (keys_of(command), *parts_of_choices) if found]
    settings = [set_wrongly(rng, rng.choice(rng.choice(keys))) for _ in range(rng.choice([1, 1, 2, 3]))]
    return Draw(command, [*choices, *settings])


def owner(command: str, choice: str) -> str:
    """The command whose config shows the keys of a choice: train's, composed once for all, if it has the group."""
    return "train" if choice.partition("=")[0] in groups_of("train") else command


def choose(rng: random.Random, group: str, choices: list[str]) -> list[str]:
    """A choice of a group, with what it needs to work here."""
    choice = rng.choice(choices)
    needed = {
        "data=cached": ["data.path=cache"],
        "data=text_files": ["data.paths=[text/*.txt]"],
        "lm=transformers": ["lm.name=tiny", "lm.sites=[transformer.h.1]"],
        "lm=nnsight": ["lm.name=tiny", "lm.sites=[transformer.h.1]"],
        "lm=transformer_lens": ["lm.name=tiny", "lm.sites=[blocks.1.hook_resid_pre]"],
        "lm=paired": ["lm.base.name=tiny", "lm.tuned.name=tiny", "lm.base.sites=[transformer.h.1]"],
        "sae=route": ["++lm.sites=[transformer.h.1,transformer.h.3]"],
    }
    return [f"{group}={choice}", *needed.get(f"{group}={choice}", [])]


def set_wrongly(rng: random.Random, key: str) -> str:
    """An override of the key with any value or, more rarely, one that is no override."""
    if rng.random() < 0.1:
        return rng.choice(MANGLED).format(key)
    return f"{key}={rng.choice(rng.choice([PLAUSIBLE, VALUES]))}"


def prepare() -> None:
    """Make a finished run, a cache and a text in the working folder."""
    Path("text").mkdir()
    Path("text", "a.txt").write_text("one duck, two ducks. " * 400)
    Path("text", "b.txt").write_text("three ducks. " * 400)
    for command, where in (("train", "hydra.run.dir=whole"), ("harvest", "cache_dir=cache")):
        assert outcome(Draw(command, [where])) == "success"


def outcome(drawn: Draw) -> str:
    """Run a draw's command; return "success" or the sentence in which it ended.

    Raises:
        AssertionError: it ended in another way.
    """
    said: list[str] = []
    hydra_state = Singleton.get_state()
    arguments = [drawn.command, *TINY[drawn.command], *drawn.overrides]

    def leave(message: str, code: int) -> None:
        said.append(message)
        sys.exit(code)

    with (
        mock.patch.object(entry, "_leave", leave),
        mock.patch.object(entry, "_override", ""),
        mock.patch.dict(refused._found, clear=True),
        mock.patch.object(Hydra, "get_mode", return_value=None),  # composes a second time
        mock.patch.object(sys, "argv", arguments),
        mock.patch.dict(os.environ, {"HOME": os.getcwd()}),  # noqa: PTH109
        fuel(120),
        silence(),
    ):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        try:
            import_module(f"sae_lab.{drawn.command}").main()
        except (Enough, SystemExit):
            pass
        except BaseException as e:
            raise AssertionError(f"{drawn}\n{traceback.format_exc()}") from e
        finally:
            Singleton.set_state(hydra_state)
    if not said:
        return "success"
    assert said[0].strip(), drawn
    assert len(said[0].splitlines()) == 1, f"{drawn}\n{said[0]}"
    return said[0]


@contextlib.contextmanager
def fuel(n: int) -> Iterator[None]:
    """Raise Enough at the n-th row of text, pass of a language model or training step."""
    burnt = [0]

    def burning(function):
        def burn(*args, **kwargs):
            burnt[0] += 1
            if burnt[0] > n:
                raise Enough
            return function(*args, **kwargs)

        return burn

    slow = [
        (TextRows, "__next__"),
        (StoredRows, "take"),
        (StoreBuilder, "_append"),
        (LanguageModel, "activations"),
        (LanguageModel, "logits"),
        (Optimizer, "zero_grad"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name in slow:
            stack.enter_context(mock.patch.object(owner, name, burning(getattr(owner, name))))
        yield


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after so many seconds."""

    def alarm(*_):
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop what a command prints and logs; restore signal handlers and log handlers that it set."""
    before = {signum: signal.getsignal(signum) for signum in entry.stopping_signals()}
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Refuse memory beyond n_bytes more than this process has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> None:
    first, last = map(int, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare()
        with memory_limit(6 * 2**30):
            for seed in range(first, last):
                drawn = draw(seed)
                try:
                    with time_limit(300):
                        print(seed, drawn, "->", outcome(drawn)[:300], flush=True)
                except AssertionError as e:
                    print("FOUND", seed, e, flush=True)


if __name__ == "__main__":
    main()
