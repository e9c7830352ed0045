"""SIGINT and SIGTERM, recorded when they arrive and handled when it is safe."""

import signal
import time
from types import FrameType
from typing import Any

from sae_lab.runtime.errors import Interrupted


class Signals:
    """Records the first SIGINT or SIGTERM; a second one ends the process at once.

    A second signal within ECHO seconds is ignored: `timeout make demo` sends SIGTERM both to make, which passes it on,
    and to this process.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
        before: dict[int, Any] = {s: signal.signal(s, self._note) for s in self.SIGNALS}
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
