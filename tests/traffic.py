"""Counts what ranks hand to collective operations, for tests and for plans of larger runs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

SENT = {"all_reduce": 0, "all_gather": 1, "broadcast": 0}
"""Functions of torch.distributed, each with the position of the tensor that a rank contributes."""


@contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Count the bytes that this process hands to each collective inside the block.

    What goes over the links follows from them: of n ranks, each sends 2 (n - 1) / n of the bytes of an all_reduce, and
    n - 1 times those of an all_gather.
    """
    totals: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in SENT}

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            totals[name] += arguments[SENT[name]].nbytes
            return collective(*arguments, **settings)

        return call

    for name, collective in originals.items():
        setattr(dist, name, counted(name, collective))
    try:
        yield totals
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)
