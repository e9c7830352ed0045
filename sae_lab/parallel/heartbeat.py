"""Signs of life between the processes of a group, so that a machine or network that falls silent ends the others soon.

A machine whose processes are killed closes its connections, and torch raises an error in the others. A machine that
loses its network or its power closes nothing: TCP waits for minutes, and a collective operation for its whole timeout,
which must be long, because blocks of activations take long to fill. torchelastic's agents watch the processes of their
own machine, and NCCL's watchdog its own operations.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count

import torch.distributed as dist

from sae_lab.parallel.environment import Place, connect
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.signals import PARENT, received_signal

log = logging.getLogger(__name__)

PERIOD = 3.0  # seconds between two signs of life
PATIENCE = 10  # periods without one after which a process is lost
LOST = "lost"  # key of what rank 0 says of a lost process


class LostRank(UserError):
    """Another process has ended or does not answer. The reason is there, if it could say one."""

    def __str__(self) -> str:
        return f"{self.args[0]}: the same command continues."


class FailedRank(LostRank):
    """Another process has failed and left its error's message."""

    def __str__(self) -> str:
        return self.args[0]


def print_error(error: Exception) -> None:
    print(error, file=sys.stderr, flush=True)


report: Callable[[Exception], None] = print_error
"""Says why this process ends. launch.py replaces it by what tells the process that started this one."""


class Heartbeat:
    """Tells the other processes of a group that this one lives, and ends this one when another is silent for too long.

    Rank 0 watches all others, and they watch rank 0, so that a store serves 2 n requests a period. A second thread
    counts the periods, since the first may wait for a store that is out of reach. It counts periods and not seconds, so
    that a command that was suspended as a whole goes on.
    """

    def __init__(self, here: Place, group: str):
        self.here = here
        self.store = dist.PrefixStore(group, connect(here, timedelta(seconds=PERIOD * PATIENCE)))
        self.silent = dict.fromkeys(range(1, here.size) if here.rank == 0 else [0], 0)
        self.unreached = ""
        self.left = threading.Event()
        self.store.set(str(here.rank), "")
        if here.rank == 0:
            self.store.set(LOST, "")

    def exchange(self) -> None:
        """Give signs of life and listen to those of the others, until the group is left."""
        heard: dict[int, bytes] = {}
        for number in count():
            if self.left.wait(PERIOD):
                return
            try:
                self.store.set(str(self.here.rank), str(number))
                lost, *signs = self.store.multi_get([LOST, *map(str, self.silent)])
            except RuntimeError as e:  # if an agent was killed that held it, there is time to stop together and to save
                self.unreached = f"rank {self.here.rank} of {self.here.size} does not reach the store ({first_line(e)})"
                return
            if lost:
                self.end(lost.decode())
            new = {rank: sign for rank, sign in zip(self.silent, signs, strict=True) if heard.get(rank) != sign}
            heard |= new
            self.silent |= dict.fromkeys(new, 0)

    def count_periods(self) -> None:
        """End this process when another one was silent for PATIENCE periods, unless the group is left before."""
        while not self.left.wait(PERIOD):
            self.silent = {rank: periods + 1 for rank, periods in self.silent.items()}
            for rank, periods in self.silent.items():
                if periods > PATIENCE:
                    silent = f"rank {rank} of {self.here.size} gave no sign of life for {PERIOD * PATIENCE:.0f} s"
                    self.end(self.unreached or silent)

    def end(self, what: str) -> None:
        """End this process at once, since its main thread may be waiting for the lost one; first tell the others."""
        if self.left.wait(PERIOD):  # the store may be gone because the group has been left
            return
        report(LostRank(what))
        if self.here.rank == 0:
            with suppress(RuntimeError):  # the store is what is lost
                self.store.set(LOST, what)
                self.left.wait(PERIOD)  # until the others have heard it: with this process, the store may go
        os._exit(1)


def parent_is_gone() -> bool:
    """Return whether the process that started this one has ended."""
    parent = multiprocessing.parent_process()
    return os.getppid() != PARENT if parent is None else not parent.is_alive()


def stop_without_parent(left: threading.Event) -> None:
    """Send SIGTERM to this process when the one that started it is gone, so that all stop and save.

    An agent or a batch script that was killed ends no process, and one that passed a signal on before has stopped this.
    """
    while not left.wait(PERIOD):
        if parent_is_gone():
            log.warning("the process that started this one is gone, so it stops")
            if received_signal() is None:  # a second one would end it at once
                os.kill(os.getpid(), signal.SIGTERM)
            return


@contextmanager
def heartbeat(here: Place, group: str) -> Iterator[None]:
    """End this process if another one of its group is lost, inside the block; stop it if its parent is gone."""
    beats = Heartbeat(here, group)
    for work in (beats.exchange, beats.count_periods, partial(stop_without_parent, beats.left)):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        beats.left.set()
