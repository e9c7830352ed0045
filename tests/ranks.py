"""Processes that know each other, for tests of what n ranks compute together."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from sae_lab.parallel.mesh import data_axis

HOST = "127.0.0.1"
Call: TypeAlias = Callable[..., list[Any]]
"""call(function, *arguments): what it returns in each process, in the order of their ranks."""


def join(rank: int, n: int, port: int) -> None:
    store = dist.TCPStore(HOST, port, n, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)


@contextmanager
def start_ranks(n: int) -> Iterator[Call]:
    """Start n processes in one gloo group, each with one thread."""
    start = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # fork spares the imports
    pools = [concurrent.futures.ProcessPoolExecutor(1, start) for _ in range(n)]

    def call(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        futures = [pool.submit(function, *arguments) for pool in pools]
        done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises before the other one, which may wait for it, is asked
        return [future.result() for future in futures]

    try:
        call(torch.set_num_threads, 1)  # all are forked before the store has a thread, whose locks a fork would copy
        store = dist.TCPStore(HOST, 0, n, is_master=True, wait_for_workers=False)
        joining = [pool.submit(join, rank, n, store.port) for rank, pool in enumerate(pools)]
        for future in joining:
            future.result()
        yield call
    finally:
        for pool in pools:
            for process in pool._processes.values():
                process.kill()
            pool.shutdown()


def rank_share(batch: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a batch. If n does not divide b, the last b mod n rows go to no rank."""
    return batch[data_axis().share(len(batch))]
