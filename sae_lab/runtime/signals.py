"""SIGINT and SIGTERM, noted and acted on when it is safe."""

import signal
import time
from types import FrameType
from typing import Any

from sae_lab.runtime.errors import Interrupted


class Signals:
    """Notes the first SIGINT or SIGTERM as `received`, to be acted on once it is `due`; a later one ends the process.

    A repeat within ECHO seconds is the same wish: `timeout make demo` sends it to make, which passes it on, and to us.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO = 2.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._time = 0.0
        self.due: int | None = None
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on; again where other code has put its handlers in between."""
        before: dict[int, Any] = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        self._handlers = self._handlers or before

    def restore(self) -> None:
        """As it was before the first `listen`."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signum, time.monotonic()
        elif time.monotonic() - self._time > self.ECHO:
            raise Interrupted("Stopped at once by a second signal; what was saved before stands", signum)
