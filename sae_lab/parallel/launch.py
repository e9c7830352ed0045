"""`trainer=ddp trainer.devices=n`: n processes train one SAE, alone or as a job of a sweep.

The process of the run is rank 0, and alone writes into its folder. It starts the others as
`python -m sae_lab.parallel.follower`, which read the config from the folder's `.hydra/` and know nothing of Hydra.
(Lightning's launcher would start the user's command again: inside `-m` that is the whole sweep, in a folder of another
second.) The others live as long as the pipe from rank 0 is open; so none is left over, whatever ends rank 0. They leave
signals to it.
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
GRACE = 30.0  # seconds between the end of one process and that of what waits for it


class Child:
    """A rank above 0: its process, and what it says in `rank_<r>.log`, which stays if it failed."""

    def __init__(self, target: str, folder: Path, rank: int, n: int, port: int):
        self.rank, self.n, self.log = rank, n, folder / f"rank_{rank}.log"
        command = [sys.executable, "-m", "sae_lab.parallel.follower", target, str(folder), *map(str, (rank, n, port))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)

    def failure(self) -> str | None:
        """What to say where it has ended before its time."""
        code = self.process.poll()
        if code is None:
            return None
        said = self.log.read_text(errors="replace").strip() or f"exit code {code}"
        last = said.splitlines()[-1]
        return f"process {self.rank} of {self.n} ended early ({last}): see {self.log}; the same command continues."

    def end(self) -> None:
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
def joined_by_ranks(folder: Path, n: int, target: str) -> Iterator[None]:
    """Inside, this process is rank 0 of n that train the run in `folder`; the others go when it leaves.

    Args:
        folder: of the run.
        n: processes.
        target: what the others call with the folder, as "module:function".

    Raises:
        UserError: another process has ended early.
    """
    if n == 1:
        yield
        return
    children: list[Child] = []
    with ExitStack() as stack:
        stack.callback(end_all, children)
        store = dist.TCPStore(HOST, 0, n, is_master=True, wait_for_workers=False, timeout=TIMEOUT)  # 0: any free port
        children += [Child(target, folder, rank, n, store.port) for rank in range(1, n)]
        wait_until_ready(store, children)
        stack.enter_context(share_threads(n))
        stack.enter_context(process_group(0, n, store))
        stack.enter_context(watch_children(children))  # left first: the others end before rank 0 leaves the group
        yield


@contextmanager
def watch_children(children: list[Child]) -> Iterator[None]:
    """Say what the others say where the work inside hears no more of them, and end them after it."""
    done = threading.Event()
    threading.Thread(target=exit_if_stuck, args=(children, done), daemon=True).start()
    try:
        yield
    except RuntimeError as e:  # what torch raises then
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
    """Until all have come as far as rank 0 is."""
    while store.add("ready", 0) < len(children):
        reason = first_failure(children, 0.1)
        if reason is not None:
            raise UserError(reason)


def first_failure(children: list[Child], seconds: float) -> str | None:
    """What the first of them that failed has to say; it may take a moment until one is seen to have."""
    end = time.monotonic() + seconds
    while True:
        for child in children:
            if (reason := child.failure()) is not None:
                return reason
        if time.monotonic() > end:
            return None
        time.sleep(0.02)


def exit_if_stuck(children: list[Child], done: threading.Event) -> None:
    """End this process where it waits for a rank that is no more: on a GPU no exception may come."""
    while not done.wait(1.0):
        reason = first_failure(children, 0.0)
        if reason is not None:
            if not done.wait(GRACE):
                print(reason, file=sys.stderr, flush=True)
                os._exit(1)
            return


@contextmanager
def share_threads(n: int) -> Iterator[None]:
    """The threads of this machine's processors, shared among n processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // n))
    try:
        yield
    finally:
        torch.set_num_threads(before)
