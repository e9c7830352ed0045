"""Prefetch: compute the next chunks in a background thread during training."""

import atexit
import threading
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch

from sae_lab.activations.source import Chunk, Source

EXIT_SECONDS = 10.0  # maximum time that an exiting process waits for the chunk being computed


class PrefetchedSource:
    """A Source that reads another Source up to `n_chunks` chunks ahead, in a thread.

    Chunks and their order are unchanged. Each chunk carries the state from which it can be computed again, so chunks
    that were prefetched but not used are in no checkpoint; a resumed run computes them again. An exception in the
    source is raised unchanged, in place of the chunk that failed.
    """

    def __init__(self, source: Source, n_chunks: int, device: torch.device):
        self.source, self.n_chunks, self.device = source, n_chunks, device

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        """Yield the chunks. Closing the generator stops its thread as soon as the current chunk is finished."""
        reader = Reader(iter(self.source), self.n_chunks, self.device)
        reader.start()
        atexit.register(reader.stop, EXIT_SECONDS)
        unregister = atexit.unregister  # at interpreter exit, the module may be cleared before this generator is closed
        try:
            yield from reader.chunks()
        finally:
            reader.stop()
            unregister(reader.stop)


class Reader(threading.Thread):
    """Thread that reads up to `n_places` chunks ahead.

    On a GPU it works on its own CUDA stream, and synchronizes the stream before it hands over a chunk.
    """

    def __init__(self, source: Iterator[Chunk], n_places: int, device: torch.device):
        super().__init__(name="prefetch", daemon=True)
        self.source = source
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._n_threads = torch.get_num_threads()
        self._places = threading.Semaphore(n_places)
        self._ready: SimpleQueue[Chunk | BaseException | None] = SimpleQueue()
        self._stopping = False

    def run(self) -> None:
        # A new thread gets torch's current global number of threads, which the main thread may have lowered meanwhile
        # (runtime/threads.py). The rounding of matrix products depends on it, so it is set back to the number at
        # construction. The getter is called first because it makes torch initialize.
        torch.get_num_threads()
        torch.set_num_threads(self._n_threads)
        item: Chunk | BaseException | None = None
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                while self._free_place() and (item := next(self.source, None)) is not None:
                    if self._stream is not None:
                        self._stream.synchronize()
                    self._ready.put(item)
            self._ready.put(None)
        except BaseException as e:
            self._ready.put(e)

    def _free_place(self) -> bool:
        self._places.acquire()
        return not self._stopping

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks as they become ready."""
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item.rows.is_cuda:  # keeps the side stream from reusing this memory while the consumer still works on it
                item.rows.record_stream(torch.cuda.current_stream(item.rows.device))
            yield item
            self._places.release()

    def stop(self, seconds: float | None = None) -> None:
        """Stop after the current chunk; wait for the thread, at most `seconds`."""
        self._stopping = True
        self._places.release()
        self.join(seconds)
