"""The process group of a run: joined by the processes that were started together, and left at the end of training."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sae_lab.parallel.environment import Place, choose_interface, own_gpu, place, shared_store
from sae_lab.parallel.heartbeat import LostRank, heartbeat
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.errors import first_line

TIMEOUT = timedelta(minutes=30)  # of one collective operation; the longest wait is for another rank to fill its block
T = TypeVar("T")
_groups = count()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of the processes that were started together, inside the block.

    A process that was started alone joins none. Each process uses a GPU of its own, if there are enough.

    Raises:
        UserError: another process was lost.
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
    with raise_if_lost(here):
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=TIMEOUT)
        try:
            with heartbeat(here, name):
                yield
        finally:
            dist.destroy_process_group()


@contextmanager
def raise_if_lost(here: Place) -> Iterator[None]:
    """Raise a UserError for torch's error about a process that has ended or does not answer."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        reason = re.sub(r"^\[\S+\] ", "", first_line(e)).split(". ")[0]  # without torch's source file and advice
        raise LostRank(f"rank {here.rank} of {here.size} has lost another one ({reason})") from e


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
