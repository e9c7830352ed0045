"""`trainer=ddp trainer.devices=n`: torch's elastic agent starts n processes of this machine, which train one SAE.

The process that the user started passes signals on to them. The agent would kill them 30 seconds after one: it runs in
a thread, where it installs no handlers. Rank 0 has the terminal; what the others print goes to `rank_<r>.log` in the
run folder if they fail.
"""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sae_lab.parallel import heartbeat
from sae_lab.runtime.errors import Interrupted, SafeStop, UserError, first_line
from sae_lab.runtime.signals import ALWAYS, IF_FREE, handled_by, raise_interrupted

HOST = "127.0.0.1"
NOISE = ("torch.multiprocessing.spawn", "torch.distributed.elastic.multiprocessing.api")
"""Loggers that tell of a failed process, with tracebacks of the agent, before `failure_of` does."""
GRACE = 2.0  # seconds that a process waits before it fails for a lost one, which the agent then sees first


def run_ranks(n: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call function(*arguments) in n processes of this machine, and return what it returns in rank 0.

    Args:
        folder: the run folder, for the logs of processes that fail.
        function: a function of a module, with arguments that can be pickled.

    Raises:
        UserError: a process failed, with its own error if that was one.
        Interrupted: a signal stopped them.
    """
    for logger in NOISE:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost store torch tells with 50 lines of C++
    print(f"starting {n} processes", file=sys.stderr, flush=True)  # not in the log, whose folder may stay unused
    with (
        tempfile.TemporaryDirectory() as name,
        handled_by(partial(pass_on, files := Path(name))) as received,
        without_main(),
        ThreadPoolExecutor(1, initializer=block_signals) as agent,
    ):
        meet: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": f"{HOST}:0", "local_addr": HOST}
        config = LaunchConfig(1, 1, n, DefaultLogsSpecs(os.devnull), files.name, max_restarts=0, **meet)
        launch = partial(elastic_launch(config, run_rank), files, max(1, torch.get_num_threads() // n))
        try:
            result, stop = agent.submit(launch, function, arguments).result()[0]
        except ChildFailedError as e:
            raise failure_of(e, received, files, folder, n) from e
    if stop is not None:
        raise SafeStop(*stop)
    return result


@contextmanager
def without_main() -> Iterator[None]:
    """Let no process import the file that this one runs: it may have no `__main__` guard, or be standard input."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def block_signals() -> None:
    """Block signals in this thread and in the processes that it starts, which unblock them once they can be stopped."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*ALWAYS, *IF_FREE))
    resource_tracker.ensure_running()  # a process of multiprocessing, which would be started later and unblock two
    signal.pthread_sigmask(signal.SIG_BLOCK, (*ALWAYS, *IF_FREE))


def pass_on(files: Path, signum: int, _: Any) -> None:
    """Pass a signal on to the processes. One that is started later finds the file."""
    (files / "signal").touch()
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signum)


def run_rank(
    files: Path, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, tuple[str, int] | None]:
    """Call the function in a process that was started. Returns its result, and how a signal stopped it or None."""
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ALWAYS, *IF_FREE))
    if (files / "signal").exists() or heartbeat.parent_is_gone():
        raise SystemExit(1)
    if rank:
        os.dup2(os.open(files / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
    torch.set_num_threads(threads)
    heartbeat.report = partial(keep_error, files / f"{rank}.error")
    try:
        return function(*arguments), None
    except Interrupted as e:
        if rank == 0 and heartbeat.parent_is_gone():  # nobody else says it
            print(f"{e}: the same command continues.", file=sys.stderr)
        return None, (str(e), e.signum)
    except Exception as e:
        if not isinstance(e, UserError):
            traceback.print_exc()
        heartbeat.report(e)
        if isinstance(e, heartbeat.LostRank):
            time.sleep(GRACE)
        raise SystemExit(1) from None
    finally:
        if heartbeat.parent_is_gone():  # torch would wait until it has taken the result
            raise SystemExit(1)


def keep_error(file: Path, error: Exception) -> None:
    """Write an error to the file from which `failure_of` reads it."""
    try:
        pickle.loads(content := pickle.dumps(error))
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    with suppress(FileNotFoundError):  # the process that reads it is gone
        file.write_bytes(content)


def failure_of(failed: ChildFailedError, received: list[int], files: Path, folder: Path, n: int) -> Exception:
    """Return the error that ended the processes: that of a process that failed by itself, if one did.

    Raises:
        Interrupted: a signal ended them.
    """
    errors = {int(file.stem): pickle.loads(file.read_bytes()) for file in files.glob("*.error")}
    failures: dict[int, Exception | None] = dict.fromkeys(failed.failures) | errors
    # Its own error says more than an exit code, and both say more than what others saw of its loss.
    rank = min(failures, key=lambda r: (isinstance(failures[r], heartbeat.LostRank), failures[r] is None, r))
    error = failures[rank]
    if error is None or isinstance(error, heartbeat.LostRank):
        for signum in (*received, *(-f.exitcode for f in failed.failures.values())):
            if signum in (*ALWAYS, *IF_FREE):
                raise_interrupted(signum)
    if error is not None and (rank == 0 or isinstance(error, UserError)):
        return error
    if error is not None:
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        code = failed.failures[rank].exitcode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    log = files / f"rank_{rank}.log"
    kept = shutil.copy(log, folder) if log.exists() and log.read_bytes() and folder.is_dir() else None
    seen = f"see {kept}; the same command continues" if kept else "the same command continues"
    return UserError(f"process {rank} of {n} ended early ({reason}): {seen}.")
