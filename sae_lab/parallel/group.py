"""The process group of a run: joined by the processes that were started together, and left at the end of training."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sae_lab.parallel.environment import Place, choose_interface, own_gpu, place, shared_store
from sae_lab.parallel.heartbeat import FailedRank, LostRank, heartbeat
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.errors import Interrupted, UserError, first_line

TIMEOUT = timedelta(minutes=30)  # of one collective operation; the longest wait is for another rank to fill its block
T = TypeVar("T")
_groups = count()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of the processes that were started together, inside the block.

    A process that was started alone joins none. Each process uses a GPU of its own, if there are enough.

    Raises:
        UserError: another process was lost, or failed.
        Interrupted: a signal stopped another process.
    """
    here = place()
    if here is None or dist.is_initialized():
        yield
        return
    gpu, name = own_gpu(), f"group {next(_groups)}"
    if gpu is not None:
        torch.cuda.set_device(gpu)
    choose_interface(here)
    store = dist.PrefixStore(name, shared_store(here, TIMEOUT))
    backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
    with raise_if_lost(here, store):
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=TIMEOUT)
        try:
            with last_words(here, store), heartbeat(here, name):
                yield
        finally:
            dist.destroy_process_group()


WORDS = "last words"  # key of why the first process has left


@contextmanager
def last_words(here: Place, store: dist.Store) -> Iterator[None]:
    """Tell the other processes why this one leaves the block, if an error or a signal ends it, and it is the first."""
    try:
        yield
    except (Exception, Interrupted) as e:
        if not is_loss(e):
            signum = e.signum if isinstance(e, Interrupted) else None
            said = str(e)
            if not isinstance(e, UserError | Interrupted):
                said = f"rank {here.rank} of {here.size} has failed ({type(e).__name__}: {first_line(e)})."
            with suppress(RuntimeError):  # rank 0, which may hold the store, is gone
                store.compare_set(WORDS, "", json.dumps([said, signum]))
        raise


@contextmanager
def raise_if_lost(here: Place, store: dist.Store) -> Iterator[None]:
    """Raise an error for torch's about a process that has ended or does not answer, with its last words if it left any.

    Raises:
        Interrupted: a signal stopped the other one.
        LostRank: anything else ended it.
    """
    try:
        yield
    except RuntimeError as e:
        if not is_loss(e):
            raise
        said, signum = hear_last_words(store)
        if signum is not None:
            raise Interrupted(said, signum) from e
        if said:
            raise FailedRank(said) from e
        reason = re.sub(r"^\[\S+\] ", "", first_line(e)).split(". ")[0]  # without torch's source file and advice
        raise LostRank(f"rank {here.rank} of {here.size} has lost another one ({reason})") from e


def hear_last_words(store: dist.Store) -> tuple[str, int | None]:
    """Return the sentence of the process that has left first, "" if it left none, and the signal that stopped it."""
    with suppress(RuntimeError):  # rank 0, which may hold the store, is gone
        if store.check([WORDS]):
            said, signum = json.loads(store.get(WORDS))
            return said, signum
    return "", None


def is_loss(error: BaseException) -> bool:
    """Return whether torch raised an error because another process has ended or does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def on_rank_0(function: Callable[[], T]) -> T:
    """Return what function() returns on rank 0, on all ranks. A UserError there ends the others without a word."""
    if world_size() == 1:
        return function()
    told: list[Any] = [None, False]
    try:
        if rank() == 0:
            told = [function(), True]
    finally:
        dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    if not told[1]:
        raise SystemExit(1)
    return told[0]
