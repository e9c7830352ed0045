"""Entry points as a shell starts them, each in a process of its own, but forked from one that has imported them all.

A start by the shell spends 4 s of a processor on imports, most of what a test of a mistake costs. What is forked here
comes from multiprocessing's fork server: a fresh interpreter, which has imported preloaded.py and run nothing, so
that no run sees what a test has done before. The processes of `trainer=ddp`, which the package spawns, come from it as
well. `shell=True` starts by `python -m`, for what a fork cannot show; its processes are spawned.
"""

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from multiprocessing import context, forkserver
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch

from sae_lab.runtime.signals import IF_FREE


class Inherited:
    """What a spawned process has from the one that starts it, and one that a server forks has not."""

    def __reduce__(self) -> tuple:
        ignored = [signum for signum in IF_FREE if signal.getsignal(signum) == signal.SIG_IGN]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return inherit, (dict(os.environ), str(Path.cwd()), DupFd(1), DupFd(2), ignored, blocked)


def inherit(environment: dict[str, str], folder: str, out: Any, err: Any, ignored: list[int], blocked: set) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, own in ((out, 1), (err, 2)):
        os.dup2(descriptor.detach(), own)
    for signum in IF_FREE:
        signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Forks(context.ForkServerContext):
    """Stands in for multiprocessing's way to spawn a process, which would import the package each time."""

    def Process(self, target: Callable[..., None], args: tuple, **options: Any) -> BaseProcess:
        return context.ForkServerProcess(target=call, args=(Inherited(), target, args), **options)


def call(inherited: None, target: Callable[..., None], arguments: tuple) -> None:
    """What a process of the server runs. Processes that it starts come from the same server: it would start another."""
    import preloaded  # noqa: F401  (which the server has imported)

    forkserver._forkserver.ensure_running = lambda: None
    target(*arguments)


FORKS = Forks()
FORKS.set_forkserver_preload(["preloaded"])  # found by the PYTHONPATH of conftest.py
context._concrete_contexts["spawn"] = FORKS


def run(*overrides: str, module: str = "train", shell: bool = False, **options) -> subprocess.CompletedProcess[str]:
    """To its end; `options` are those of Forked, or with `shell` of subprocess.run."""
    if shell:
        command = [sys.executable, "-m", f"sae_lab.{module}", *overrides]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)
    return Forked(*overrides, module=module, **options).communicate()


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start target(*arguments) in a process of the server."""
    process = FORKS.Process(target, arguments)
    process.start()
    return process


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
    sys.path.insert(0, cwd)  # as `python -m`
    os.environ.update(env)
    entry = import_module(module)
    torch.set_num_threads(threads)
    sys.argv = [str(entry.__file__), *overrides]
    atexit._clear()  # those of the server
    try:
        entry.main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out: W&B's waits until its files are written
