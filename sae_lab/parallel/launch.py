"""`trainer=ddp trainer.devices=n`: n processes train one SAE, as a single run or as a job of a sweep.

The process that the user started is rank 0, and the only one that writes into the run folder. It starts the other ranks
as `python -m sae_lab.parallel.follower`; they read the config from `.hydra/` in that folder and do not use Hydra.
Lightning's own launcher is not used, because it repeats the user's command: under `--multirun` that is the whole sweep,
in a new folder. Ranks above 0 exit when the pipe from rank 0 closes, so none survives it, and they block signals.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from sae_lab.parallel.collectives import TIMEOUT, process_group
from sae_lab.runtime.errors import UserError

HOST = "127.0.0.1"
GRACE = 30.0  # seconds that a lost rank has to exit, and that rank 0 may still wait for a rank that exited


class Child:
    """Process of a rank above 0. Its output goes to `rank_<r>.log`, which is kept if the process fails."""

    def __init__(self, target: str, folder: Path, rank: int, n: int, port: int):
        self.rank, self.n, self.log = rank, n, folder / f"rank_{rank}.log"
        command = [sys.executable, "-m", "sae_lab.parallel.follower", target, str(folder), *map(str, (rank, n, port))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)

    def failure(self) -> str | None:
        """Return an error message if the process has exited, else None."""
        code = self.process.poll()
        if code is None:
            return None
        output = self.log.read_text(errors="replace").strip() or f"exit code {code}"
        last_line = output.splitlines()[-1]
        return f"process {self.rank} of {self.n} ended early ({last_line}): see {self.log}; the same command continues."

    def end(self) -> None:
        """Let the process exit, kill it after 10 seconds, and delete its log if it succeeded."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.returncode == 0:
            self.log.unlink(missing_ok=True)


@contextmanager
def launch_ranks(folder: Path, n: int, target: str) -> Iterator[None]:
    """Start ranks 1 to n - 1 on the run in `folder`; inside the block this process is rank 0, after it they exit.

    Args:
        folder: the run folder.
        n: number of processes.
        target: the function that the other ranks call with `folder`, as "module:function".

    Raises:
        UserError: another rank exited early.
    """
    if n == 1:
        yield
        return
    children: list[Child] = []
    with ExitStack() as stack:
        stack.callback(end_all, children)
        store = dist.TCPStore(HOST, 0, n, is_master=True, wait_for_workers=False, timeout=TIMEOUT)  # port 0: any free
        children += [Child(target, folder, rank, n, store.port) for rank in range(1, n)]
        wait_until_ready(store, children)
        stack.enter_context(share_threads(n))
        stack.enter_context(process_group(0, n, store))
        stack.enter_context(watch_children(children))  # exits first: the others end before rank 0 leaves the group
        yield


@contextmanager
def watch_children(children: list[Child]) -> Iterator[None]:
    """Turn torch's error about a lost rank into a UserError with that rank's message; end all children at exit."""
    done = threading.Event()
    threading.Thread(target=exit_if_stuck, args=(children, done), daemon=True).start()
    try:
        yield
    except RuntimeError as e:  # torch raises it when a rank is lost
        lost = isinstance(e, dist.DistError) or "gloo" in str(e)
        reason = first_failure(children, GRACE if lost else 0.0)
        if reason is None:
            raise
        raise UserError(reason) from e
    finally:
        done.set()
        end_all(children)


def end_all(children: list[Child]) -> None:
    for child in children:
        child.end()


def wait_until_ready(store: dist.Store, children: list[Child]) -> None:
    """Wait until all children are ready to join the process group."""
    while store.add("ready", 0) < len(children):
        reason = first_failure(children, 0.1)
        if reason is not None:
            raise UserError(reason)


def first_failure(children: list[Child], seconds: float) -> str | None:
    """Return the message of the first child that failed, waiting up to `seconds` for one; None if none did."""
    deadline = time.monotonic() + seconds
    while True:
        for child in children:
            if (reason := child.failure()) is not None:
                return reason
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def exit_if_stuck(children: list[Child], done: threading.Event) -> None:
    """Exit this process if it still waits for a rank that failed GRACE seconds ago: on a GPU torch may not raise."""
    while not done.wait(1.0):
        reason = first_failure(children, 0.0)
        if reason is not None:
            if not done.wait(GRACE):
                print(reason, file=sys.stderr, flush=True)
                os._exit(1)
            return


@contextmanager
def share_threads(n: int) -> Iterator[None]:
    """Use 1/n of torch's threads inside the block, so that n processes do not compete for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // n))
    try:
        yield
    finally:
        torch.set_num_threads(before)
