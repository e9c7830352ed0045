"""Prefetch: compute the next chunks in a background thread during training."""

import atexit
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch

from sae_lab.activations.source import Chunk, Source

EXIT_SECONDS = 10.0  # maximum time that an exiting process waits for the chunk being computed


class PrefetchedSource:
    """A Source that reads another Source ahead, in a thread.

    For work that releases Python's interpreter lock: products on a CPU, and files. Where a GPU computes the chunks, the
    thread would only compete for the lock with the one that launches the training steps; see InterleavedSource.

    Chunks and their order are unchanged. Each chunk carries the state from which it can be computed again, so chunks
    that were prefetched but not used are in no checkpoint; a resumed run computes them again. An exception in the
    source is raised unchanged, in place of the chunk that failed.

    Args:
        source: the source to read.
        n_rows: the thread reads while fewer rows than this lie ready. With 0 it reads what `prepare` names, else a
            chunk when it is asked for one.
        device: the device of the rows. If it is a GPU, the thread works on a stream of its own.
    """

    def __init__(self, source: Source, n_rows: int, device: torch.device):
        self.source, self.n_rows, self.device = source, n_rows, device
        self._reader: Reader | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        """Yield the chunks. Closing the generator stops its thread as soon as the current chunk is finished."""
        self._reader = reader = Reader(iter(self.source), self.n_rows, self.device)
        reader.start()
        atexit.register(reader.stop, EXIT_SECONDS)
        unregister = atexit.unregister  # at interpreter exit, the module may be cleared before this generator is closed
        try:
            yield from reader.chunks()
        finally:
            reader.stop()
            unregister(reader.stop)

    def prepare(self, now: int, soon: int) -> None:
        """Let the thread read the next `soon` rows. Does not wait for any."""
        assert self._reader is not None
        self._reader.read_on(soon)


class Reader(threading.Thread):
    """Thread that reads chunks while fewer than n_rows rows lie ready, as far as `read_on` names, and one where the
    consumer waits for it.

    On a GPU it works on its own CUDA stream, and synchronizes the stream before it hands over a chunk.
    """

    def __init__(self, source: Generator[Chunk, None, None], n_rows: int, device: torch.device):
        super().__init__(name="prefetch", daemon=True)
        self.source, self.n_rows = source, n_rows
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._n_threads = torch.get_num_threads()
        self._ready: deque[Chunk | BaseException | None] = deque()
        self._n_read = self._n_taken = 0
        self._last = n_rows
        """Number of rows to read in all. A chunk that the consumer waits for is read in any case."""
        self._waited_for = self._stopping = False
        self._changed = threading.Condition()
        """Held while any of the above is read or changed."""

    def run(self) -> None:
        # A new thread gets torch's current global number of threads, which the main thread may have lowered meanwhile
        # (runtime/threads.py). The rounding of matrix products depends on it, so it is set back to the number at
        # construction. The getter is called first because it makes torch initialize.
        torch.get_num_threads()
        torch.set_num_threads(self._n_threads)
        item: Chunk | BaseException | None = None
        try:
            on_stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            with closing(self.source), on_stream:
                while self._wait_for_room() and (item := next(self.source, None)) is not None:
                    if self._stream is not None:
                        self._stream.synchronize()
                    self._put(item)
            self._put(None)
        except BaseException as e:
            self._put(e)

    def _wait_for_room(self) -> bool:
        """Wait until a chunk is wanted. Returns False if the thread is to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._n_read < self._last or (self._waited_for and not self._ready)
            )
        return not self._stopping

    def _put(self, item: Chunk | BaseException | None) -> None:
        with self._changed:
            self._ready.append(item)
            self._n_read += count(item)
            self._changed.notify_all()

    def _take(self) -> Chunk | BaseException | None:
        with self._changed:
            self._waited_for = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            self._waited_for = False
            item = self._ready.popleft()
            self._n_taken += count(item)
            self._last = max(self._last, self._n_taken + self.n_rows)
            self._changed.notify_all()
        return item

    def read_on(self, n_rows: int) -> None:
        """Read up to n_rows rows beyond those that were taken."""
        with self._changed:
            self._last = self._n_taken + n_rows
            self._changed.notify_all()

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks as they become ready."""
        while (item := self._take()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item.rows.is_cuda:  # keeps the side stream from reusing this memory while the consumer still works on it
                item.rows.record_stream(torch.cuda.current_stream(item.rows.device))
            yield item

    def stop(self, seconds: float | None = None) -> None:
        """Stop after the current chunk; wait for the thread, at most `seconds`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.join(seconds)


def count(item: Chunk | BaseException | None) -> int:
    """Return the number of rows of what a Reader passes on."""
    return len(item.rows) if isinstance(item, Chunk) else 0
