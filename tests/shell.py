"""Entry points as a shell starts them, each in a process of its own, but forked from one that has imported them all.

A start by the shell spends 4 s of a processor on imports, most of what a test of a mistake costs. What is forked here
comes from multiprocessing's fork server: a fresh interpreter, which has imported the entry points and run nothing, so
that no run sees what a test has done before. `shell=True` starts by `python -m`, for what a fork cannot show.
"""

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from sae_lab.parallel.launch import receive_signals, start_server

FORKS = get_context("forkserver")
ROOMS = ("training.run", "sweeps.gpus", "sweeps.figures", "studies.stage_rates", "evaluation.rules", "runs.export")
OF_A_RUN = ("sae_lab.activations.from_text", "sae_lab.cli.entry", "transformers.models.gpt2.modeling_gpt2")
"""What the entry points import while they run, which is a second of each start."""
FORKS.set_forkserver_preload([*(f"sae_lab.{name}" for name in ROOMS), *OF_A_RUN])


def run(*overrides: str, module: str = "train", shell: bool = False, **options) -> subprocess.CompletedProcess[str]:
    """To its end; `options` are those of Forked, or with `shell` of subprocess.run."""
    if shell:
        command = [sys.executable, "-m", f"sae_lab.{module}", *overrides]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)
    return Forked(*overrides, module=module, **options).communicate()


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start target(*arguments) in a process of the server."""
    start_server()
    process = FORKS.Process(target=receiving_signals, args=(target, arguments))
    process.start()
    return process


def receiving_signals(target: Callable[..., None], arguments: tuple) -> None:
    receive_signals()
    target(*arguments)


class Forked:
    """A running entry point.

    Args:
        cwd: the folder that it runs in; None for this process's.
        threads: how many torch may use.
        env: changes of the environment.
    """

    def __init__(
        self,
        *overrides: str,
        module: str = "train",
        cwd: Path | None = None,
        threads: int = 1,
        env: dict[str, str] | None = None,
    ):
        self._said = tempfile.TemporaryDirectory()
        self.overrides = overrides
        arguments = (f"sae_lab.{module}", overrides, self._said.name, str(cwd or Path.cwd()), threads, env or {})
        self.process = fork(body, *arguments)

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def communicate(self) -> subprocess.CompletedProcess[str]:
        """Wait; the exit code and what was said."""
        self.process.join()
        assert self.process.exitcode is not None
        stdout, stderr = (Path(self._said.name, name).read_text() for name in ("stdout", "stderr"))
        self._said.cleanup()
        return subprocess.CompletedProcess([*self.overrides], self.process.exitcode, stdout, stderr)


def body(module: str, overrides: tuple[str, ...], said: str, cwd: str, threads: int, env: dict[str, str]) -> None:
    """In the new process: an entry point, as `python -m` would start it."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with Path(said, name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the suite runs under nohup
    os.chdir(cwd)
    os.environ.update(env)
    entry = import_module(module)
    torch.set_num_threads(threads)
    sys.argv = [str(entry.__file__), *overrides]
    atexit._clear()  # those of the server
    try:
        entry.main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out: W&B's waits until its files are written
