"""Stops of several processes at the same step, wherever the signal arrived."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sae_lab.runtime.signals import act_on, raise_if_stopped, received_signal


class Agreement:
    """The largest signal that any rank has received, asked for at one call and known at the next.

    So no rank waits for another one that it does not wait for anyway, and all act at the same call.
    """

    def __init__(self) -> None:
        self.signum = torch.zeros(1, dtype=torch.int32)
        self.work: dist.Work | None = None

    def __call__(self) -> None:
        if self.wait():
            act_on(int(self.signum))
        self.signum.fill_(received_signal() or 0)
        self.work = dist.all_reduce(self.signum, dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> bool:
        """Wait for the answer to the last call. Returns whether any rank has received a signal."""
        if self.work is not None:
            self.work.wait()
        return bool(self.signum)


_agreement: Agreement | None = None


@contextmanager
def agreed_stops() -> Iterator[None]:
    """Let `stop_together` of all ranks raise at the same call, inside the block. It replaces every rank's own stops."""
    global _agreement
    _agreement = Agreement()
    try:
        yield
        _agreement.wait()
    finally:
        _agreement = None


def stop_together() -> None:
    """Raise SafeStop if a signal arrived on any rank before its previous call; with one process, if one arrived at all.

    All ranks must make the same calls between the same collective operations.
    """
    if _agreement is not None:
        _agreement()
    raise_if_stopped()
