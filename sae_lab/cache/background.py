"""Write a shard in a thread, while the main thread computes the next one."""

import atexit
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from sae_lab.activations.source import Chunk
from sae_lab.cache.claims import Claims
from sae_lab.cache.progress import Progress, name_of
from sae_lab.cache.shards import Shard
from sae_lab.runtime.errors import UserError

log = logging.getLogger(__name__)

AT_MOST = 0.5
"""Seconds of one wait for the thread: Python acts after it on a signal that came just before it."""
EXIT_SECONDS = 2.0
"""Seconds that an exiting process waits for the thread, at most. Python ends a process by abort() if a thread is then
inside of torch, which packs a shard in less than that; the disk is not waited for any longer."""


class HarvestEnded(Exception):
    """Another worker has ended the harvest while this one wrote a shard, which the other has done too."""


class BackgroundWriter:
    """Writes one shard at a time. The main thread, in `finish`, records it and then releases its claim.

    Args:
        write: writes a shard of that number from its chunks.
        is_complete: returns whether a worker has found that no shard is missing, and has ended the harvest.

    Attributes:
        rows: the number of activations of the shard that is being written, by the number of the shard; else empty.
    """

    def __init__(
        self,
        write: Callable[[int, list[Chunk]], Shard],
        progress: Progress,
        claims: Claims,
        is_complete: Callable[[], bool],
    ):
        self.write, self.progress, self.claims, self.is_complete = write, progress, claims, is_complete
        self.rows = dict[int, int]()
        self._shard = Future[Shard]()

    def begin(self, i: int, chunks: list[Chunk], begin: dict[str, Any]) -> None:
        """Begin to write shard i, which this worker has claimed. `begin`: the state of the text where it begins."""
        assert not self.rows, "one shard is written at a time"
        self._shard = in_thread(lambda: self._write(i, chunks, begin))
        self.rows = {i: sum(len(chunk.rows) for chunk in chunks)}

    def _write(self, i: int, chunks: list[Chunk], begin: dict[str, Any]) -> Shard:
        """Write shard i and return its entry. A shard without chunks, where the text has ended, has no file."""
        return self.write(i, chunks) if chunks else Shard("", 0, 0, begin, 0, "")

    def check(self) -> None:
        """Raise the error of the write, if it has failed already. Does not wait."""
        if self.rows and self._shard.done() and self._shard.exception() is not None:
            self.finish()

    def finish(self) -> None:
        """Wait until the shard, if any, is on disk; record it and release its claim.

        Raises:
            HarvestEnded: it could not be written or recorded, because the harvest is complete.
        """
        if not self.rows:
            return
        (i,), self.rows = self.rows, {}
        try:
            while not wait([self._shard], AT_MOST).done:
                pass
            shard = self._shard.result()
            if not self.progress.has(i):
                self.progress.add(i, shard)
        except UserError as e:
            if self.is_complete():  # the end has removed the folder of the records, and unfinished files
                raise HarvestEnded from e
            raise
        finally:
            self.claims.release(name_of(i))

    def finish_after_error(self) -> None:
        """Finish, and log the error if that fails: the one that came first is raised."""
        try:
            with suppress(HarvestEnded):
                self.finish()
        except Exception as e:
            log.error("The shard before could not be written either: %s", e, exc_info=not isinstance(e, UserError))


def in_thread(work: Callable[[], Shard]) -> Future[Shard]:
    """Call `work` in a thread, and return its result to come.

    A second signal ends the process without the result, which the threads of an executor would hold up. Files are
    written atomically, so the shard is there or not.
    """
    result = Future[Shard]()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    thread = threading.Thread(target=run, name="shards", daemon=True)
    atexit.register(thread.join, EXIT_SECONDS)
    result.add_done_callback(lambda _: atexit.unregister(thread.join))
    thread.start()
    return result
