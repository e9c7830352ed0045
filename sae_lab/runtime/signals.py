"""Signals that stop a run: recorded when they arrive, acted upon where nothing is half done.

Outside of `deferred_signals` a command ends at once: there the same command repeats what a stop loses.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from sae_lab.runtime.errors import Interrupted, SafeStop

PARENT = os.getppid()  # read before the long imports, during which the parent may be killed

ALWAYS = (signal.SIGINT, signal.SIGTERM)
IF_FREE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A lost terminal, and what clusters send before they end a job. Left alone where they are ignored (nohup) or where
other code handles them. submitit's handler, which queues the job again, is called once everything is saved."""

ECHO = 2.0
"""Seconds within which a second signal is ignored: `timeout make demo` sends SIGTERM both to make, which passes it on,
and to this process."""


def raise_interrupted(signum: int, frame: FrameType | None = None) -> NoReturn:
    """Handle a signal outside of `deferred_signals`."""
    raise Interrupted(f"Stopped by {signal.Signals(signum).name}", signum)


def stopping_signals() -> list[signal.Signals]:
    """Return the signals that stop this process through this module: SIGINT, SIGTERM, and those that are free."""
    ours = (signal.SIG_DFL, raise_interrupted)
    return [*ALWAYS, *(s for s in IF_FREE if signal.getsignal(s) in ours)]


def queues_again(handler: Any) -> bool:
    """Return whether the handler of a signal is submitit's, which queues the job again and exits."""
    return getattr(handler, "__name__", "") == "checkpoint_and_try_requeue"


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[list[int]]:
    """Let handler(signum, frame) receive the signals that stop a run, inside the block. Yields those that arrived.

    Other handlers are restored at the end of the block. submitit's is called there if the first signal was its own.
    """
    arrived: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)
        handler(signum, frame)

    requeueing = [signum for signum in IF_FREE if queues_again(signal.getsignal(signum))]
    handlers: dict[int, Any] = {s: signal.signal(s, receive) for s in (*stopping_signals(), *requeueing)}
    try:
        yield arrived
    finally:
        for signum, previous in handlers.items():
            signal.signal(signum, previous)
        if arrived and arrived[0] in requeueing:
            handlers[arrived[0]](arrived[0], None)


class Recorder:
    """Handler that records the first signal; a second one ends the process at once."""

    def __init__(self, together: bool) -> None:
        self.received: int | None = None
        self.together = together
        self.agreed: int | None = None
        self._time = 0.0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signum, time.monotonic()
        elif time.monotonic() - self._time > ECHO:
            raise Interrupted("Stopped at once by a second signal; earlier checkpoints are kept", signum)


_recorder: Recorder | None = None


@contextmanager
def deferred_signals(together: bool = False) -> Iterator[None]:
    """Record signals inside the block instead of stopping. One block holds all steps and all saves of a command's work.

    The block must call `raise_if_stopped` wherever nothing is half done, and must install no other handlers.

    Args:
        together: act only on a signal that several processes have agreed upon (see parallel/agreement.py).

    Raises:
        SafeStop: at the end of the block, if a signal arrived after the last `raise_if_stopped`.
    """
    global _recorder
    assert _recorder is None, "blocks of deferred signals are not nested"
    with handled_by(recorder := Recorder(together)):
        _recorder = recorder
        try:
            yield
            raise_if_stopped()
        finally:
            _recorder = None


def received_signal() -> signal.Signals | None:
    """Return the signal that arrived since the block of deferred signals began."""
    return None if _recorder is None or _recorder.received is None else signal.Signals(_recorder.received)


def act_on(signum: int) -> None:
    """Let `raise_if_stopped` raise because of a signal that several processes have agreed upon."""
    if _recorder is not None:
        _recorder.agreed = signum


def raise_if_stopped() -> None:
    """Raise SafeStop if a signal has arrived since the block of deferred signals began. Does nothing outside of one."""
    if _recorder is None:
        return
    signum = _recorder.agreed if _recorder.together else _recorder.received
    if signum is not None:
        raise SafeStop(f"Stopped by {signal.Signals(signum).name}", signum)
