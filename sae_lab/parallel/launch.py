"""`trainer=ddp trainer.devices=n`: torch's elastic agent starts n processes of this machine, which train one SAE.

The process that the user started watches them and passes signals on. Rank 0 has its terminal; what the others print
goes to `rank_<r>.log` in the run folder if they fail. Signals are not left to the agent, which would kill the processes
30 seconds after one: it runs in a thread, where it installs no handlers. The processes fork from one server, which has
imported the package once for all jobs of a sweep.
"""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sae_lab.parallel import heartbeat
from sae_lab.runtime.errors import Interrupted, SafeStop, UserError, first_line
from sae_lab.runtime.signals import ALWAYS, IF_FREE, stopping_signals

HOST = "127.0.0.1"
NOISE = ("torch.multiprocessing.spawn", "torch.distributed.elastic.multiprocessing.api")
"""Loggers that tell of a failed process, with tracebacks of the agent, before `failure_of` does."""
SET_BY_AGENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
    print(f"starting {n} processes", file=sys.stderr, flush=True)  # not in the log, whose folder may stay unused
    multiprocessing.set_forkserver_preload([__name__, function.__module__])
    start_server()
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_AGENT}
    threads = max(1, torch.get_num_threads() // n)
    with tempfile.TemporaryDirectory() as name, passed_on_signals(Path(name)) as received, ThreadPoolExecutor(1) as own:
        files = Path(name)
        config = LaunchConfig(
            *(1, 1, n, DefaultLogsSpecs(os.devnull)),
            run_id=files.name,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{HOST}:0",
            local_addr=HOST,
            max_restarts=0,
            start_method="forkserver",
        )
        launch = partial(elastic_launch(config, run_rank), files, Terminal(), environment, threads)
        try:
            result, stop = own.submit(launch, function, arguments).result()[0]  # see above
        except ChildFailedError as e:
            stopped = [*received, *(-f.exitcode for f in e.failures.values() if -f.exitcode in (*ALWAYS, *IF_FREE))]
            if stopped:
                raise Interrupted(f"Stopped by {signal.Signals(stopped[0]).name}", stopped[0]) from None
            raise failure_of(e, files, folder, n) from e
    if stop is not None:
        raise SafeStop(*stop)
    return result


def start_server() -> None:
    """Start the server that the processes fork from, with signals blocked.

    A terminal that closes and `timeout` send theirs to all processes of a command, and the server must live until those
    that it forked have saved. It has the resources of multiprocessing tracked by another process, which must as well.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            signal.pthread_sigmask(signal.SIG_BLOCK, (*ALWAYS, *IF_FREE))  # the first one unblocks two of them
            start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def receive_signals() -> None:
    """Let signals end a process of the server. Those that the command ignores are ignored here."""
    for signum in ALWAYS:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ALWAYS, *IF_FREE))


@contextmanager
def passed_on_signals(files: Path) -> Iterator[list[int]]:
    """Pass signals on to the processes, inside the block. Yields the list of those that arrived.

    A process that starts later finds them in the file `signal`.
    """
    received: list[int] = []

    def pass_on(signum: int, _: Any) -> None:
        received.append(signum)
        (files / "signal").write_text(str(signum))
        for file in files.glob("*.pid"):
            if pid := file.read_text():
                os.kill(int(pid), signum)

    handlers = {signum: signal.signal(signum, pass_on) for signum in stopping_signals()}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


class Terminal:
    """The descriptors of standard output and error of this process, as a process that is started gets them."""

    def __init__(self, descriptors: tuple[Any, Any] | None = None):
        self.descriptors = descriptors

    def __reduce__(self) -> tuple:
        return Terminal, ((DupFd(1), DupFd(2)),)

    def use(self) -> None:
        """Make them the output and the error of this process."""
        for descriptor, own in zip(self.descriptors or (), (1, 2), strict=True):
            os.dup2(descriptor.detach(), own)


def run_rank(
    files: Path,
    terminal: Terminal,
    environment: dict[str, str],
    threads: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> tuple[Any, tuple[str, int] | None]:
    """Call the function in a process that was started. Returns its result, and how a signal stopped it or None."""
    os.environ.update(environment)
    rank = int(os.environ["RANK"])
    receive_signals()
    (files / f"{rank}.pid").write_text(str(os.getpid()))
    if (files / "signal").exists():
        raise SystemExit(1)
    terminal.use()
    if rank:
        os.dup2(os.open(files / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
    torch.set_num_threads(threads)
    heartbeat.report = partial(keep_error, files / f"{rank}.error")
    ended = threading.Event()
    threading.Thread(target=exit_without_parent, args=(ended,), daemon=True).start()
    try:
        return function(*arguments), None
    except Interrupted as stop:
        return None, (str(stop), stop.signum)
    except Exception as e:
        if not isinstance(e, UserError):
            traceback.print_exc()
        heartbeat.report(e)
        if isinstance(e, heartbeat.LostRank):
            time.sleep(GRACE)
        raise SystemExit(1) from None
    finally:
        ended.set()


def keep_error(file: Path, error: Exception) -> None:
    """Write an error to the file from which `failure_of` reads it."""
    try:
        content = pickle.dumps(error)
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    with suppress(FileNotFoundError):  # the process that reads it is gone
        file.write_bytes(content)


def exit_without_parent(ended: threading.Event) -> None:
    """Exit when the process that started this one is lost and training has ended: nobody takes the result.

    torch lets the kernel send SIGINT to this process at that moment, so that training ends soon and is saved.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        ended.wait()
        os._exit(1)


def failure_of(failed: ChildFailedError, files: Path, folder: Path, n: int) -> Exception:
    """Return the error that ended the processes: that of a process that failed by itself, if one did."""
    errors = {int(file.stem): pickle.loads(file.read_bytes()) for file in files.glob("*.error")}
    failures: dict[int, Exception | None] = dict.fromkeys(failed.failures) | errors
    # Its own error says more than an exit code, and both say more than what others saw of its loss.
    rank = min(failures, key=lambda r: (isinstance(failures[r], heartbeat.LostRank), failures[r] is None, r))
    error = failures[rank]
    if error is not None and (rank == 0 or isinstance(error, UserError)):
        return error
    reason = f"{type(error).__name__}: {first_line(error)}" if error else exit_reason(failed.failures[rank].exitcode)
    log = files / f"rank_{rank}.log"
    kept = shutil.copy(log, folder) if log.exists() and log.read_bytes() and folder.is_dir() else None
    seen = f"see {kept}; the same command continues" if kept else "the same command continues"
    return UserError(f"process {rank} of {n} ended early ({reason}): {seen}.")


def exit_reason(code: int) -> str:
    """Return the name of the signal that ended a process, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
