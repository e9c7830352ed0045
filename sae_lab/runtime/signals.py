"""Signals that stop a run, recorded when they arrive and handled when it is safe."""

import signal
import time
from types import FrameType
from typing import Any

from sae_lab.runtime.errors import Interrupted

ALWAYS = (signal.SIGINT, signal.SIGTERM)
IF_FREE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A lost terminal, and what clusters send before they end a job. Left alone where they are ignored (nohup) or where
other code handles them (submitit's requeue)."""


def raise_interrupted(signum: int, frame: FrameType | None) -> None:
    """Handle a signal outside training. (In training a checkpoint is saved first, see training/callbacks.py.)"""
    raise Interrupted(f"Stopped by {signal.Signals(signum).name}", signum)


def stopping_signals() -> list[signal.Signals]:
    """Return the signals that stop this process through this module: SIGINT, SIGTERM, and those that are free."""
    ours = (signal.SIG_DFL, raise_interrupted)
    return [*ALWAYS, *(s for s in IF_FREE if signal.getsignal(s) in ours or is_recorded(s))]


def is_recorded(signum: signal.Signals) -> bool:
    """Return whether the signal's handler is that of a Signals object."""
    return isinstance(getattr(signal.getsignal(signum), "__self__", None), Signals)


class Signals:
    """Records the first signal that stops the process; a second one ends it at once.

    A second signal within ECHO seconds is ignored: `timeout make demo` sends SIGTERM both to make, which passes it on,
    and to this process.
    """

    ECHO = 2.0

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal, from the moment at which it arrives."""
        self.due: int | None = None
        """The same signal, once the current step is to be the last. Set by the training loop."""
        self._time = 0.0
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers. May be called again, if other code has replaced them."""
        before: dict[int, Any] = {s: signal.signal(s, self._note) for s in stopping_signals()}
        self._handlers = self._handlers or before

    def restore(self) -> None:
        """Put back the handlers that were there before the first `listen`."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signum, time.monotonic()
        elif time.monotonic() - self._time > self.ECHO:
            raise Interrupted("Stopped at once by a second signal; earlier checkpoints are kept", signum)
