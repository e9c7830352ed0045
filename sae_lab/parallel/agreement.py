"""Stops of several processes at the same step, wherever the signal arrived."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sae_lab.parallel.mesh import world_size
from sae_lab.runtime.signals import act_on, deferred_signals, raise_if_stopped, received_signal


class Agreement:
    """The largest signal that any rank has received, asked for at one call and known at the next.

    So no rank waits for another one that it does not wait for anyway, and all act at the same call.
    """

    def __init__(self) -> None:
        self.signum = torch.zeros(1, dtype=torch.int32)
        self.work: dist.Work | None = None

    def ask(self) -> None:
        """Act on the answer to the last call, and ask again."""
        self.wait()
        if signum := int(self.signum):
            act_on(signum)
        self.signum.fill_(received_signal() or 0)
        self.work = dist.all_reduce(self.signum, dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


_agreement: Agreement | None = None


@contextmanager
def deferred_on_all_ranks() -> Iterator[None]:
    """Defer signals inside the block (see deferred_signals). `stop_together` raises at the same call of all ranks.

    Raises:
        SafeStop: at the end of the block, if a signal arrived on any rank after the last `stop_together`.
    """
    global _agreement
    several = world_size() > 1
    with deferred_signals(together=several):
        if not several:
            yield
            return
        _agreement = agreement = Agreement()
        try:
            yield
            agreement.ask()
            agreement.ask()
            agreement.wait()
        finally:
            _agreement = None


def stop_together() -> None:
    """Raise SafeStop if a signal arrived on any rank before its previous call; with one process, if one arrived at all.

    All ranks must make the same calls between the same collective operations.
    """
    if _agreement is not None:
        _agreement.ask()
    raise_if_stopped()
