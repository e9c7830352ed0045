"""Number of threads of CPU operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run CPU operations on one thread inside the block, for small tensors.

    Several threads save a fraction of a millisecond on free cores, but if another process uses one of the cores, every
    operation waits for that core. Measured on 2 cores, both also used by another program: the index arithmetic of a
    training step took 3 ms on one thread and 120 ms on two.
    """
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)
