"""Which of several workers does what, told by small files in a folder that all of them reach: no server, no lock.

A worker claims a piece of work by creating its file, which only one can do, and renews the claim by writing it again
while it works. A claim that does not change any more is lost, and another worker takes it over. How long a claim has
not changed is measured by the clock of the worker that looks at it, so the clocks of machines need not agree.

Two workers may do the same piece, where one was only held up. So the work must give the same files whoever does it.
"""

import json
import logging
import os
import platform
import threading
import time
from functools import cache
from typing import Any

import psutil

from sae_lab.cache.store import Store
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import parse_json

log = logging.getLogger(__name__)

BEATS = 5
"""How often a claim is renewed within the time after which it counts as lost."""
SUFFIX = ".claim"


class Claims:
    """The claims of this worker, which a thread renews inside the context; at its end they are released.

    Args:
        store: the folder of the claims.
        lost_after: seconds without a renewal after which a claim is taken over. If its process was on this machine and
            has ended, the claim is taken over at once.
    """

    def __init__(self, store: Store, lost_after: float):
        self.store, self.lost_after = store, lost_after
        self._held = set[str]()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._changing = threading.Lock()
        """Held while a claim of this worker is written or released, so that no released claim is renewed."""
        self._ended = threading.Event()
        self._n_beats = 0
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self.store.make_folder()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        for name in sorted(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim a piece of work; return whether it is this worker's now."""
        with self._changing:
            if not self.store.create(name + SUFFIX, self._content()):
                if not self.is_lost(name):
                    return False
                log.info("The worker that had %s is lost: this one goes on with it.", name)
                self.store.write(name + SUFFIX, self._content())
            self._held.add(name)
        return True

    def release(self, name: str) -> None:
        with self._changing:
            self._held.discard(name)
            self.store.remove(name + SUFFIX)

    def is_lost(self, name: str) -> bool:
        """Return whether the worker that holds a claim has ended, or has not renewed it for `lost_after` seconds."""
        try:
            content = self.store.read(name + SUFFIX)
        except FileNotFoundError:  # released: it can be created
            return False
        if has_ended(content):
            return True
        now = time.monotonic()
        seen, since = self._seen.get(name, (None, now))
        if seen != content:
            self._seen[name] = content, now
            return False
        return now - since > self.lost_after

    def _content(self) -> bytes:
        pid = os.getpid()
        here = {"host": platform.node(), "pid": pid, "started": started(pid), "beat": self._n_beats}
        return json.dumps(here).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self.lost_after / BEATS):
            with self._changing:
                self._n_beats += 1
                try:
                    for name in self._held:
                        self.store.write(name + SUFFIX, self._content())
                except UserError as e:  # the work itself may still succeed
                    log.warning("A claim is not renewed, so another worker may do the same work: %s", e)


@cache
def started(pid: int) -> float:
    """Return when a process of this machine has started, which tells it from a later one with the same number."""
    return psutil.Process(pid).create_time()


def has_ended(claim: bytes) -> bool:
    """Return whether a claim is of a process of this machine that has ended."""
    try:
        owner = parse_json(claim)
    except ValueError:  # its content is still being written
        return False
    if owner.get("host") != platform.node():
        return False
    try:
        process = psutil.Process(owner["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - owner["started"]) > 1
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return True
