"""Reading ahead: the next rows are made in a thread of their own while the current ones train."""

import atexit
import threading
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch

from sae_lab.activations.source import Chunk, Source

EXIT_SECONDS = 10.0  # that a process which ends waits for the chunk in hand


class PrefetchedSource:
    """A `buffer.Source` that another one feeds, up to `n_chunks` chunks ahead.

    The chunks are the same, in the same order. Each carries the state from which it comes again, so what lies ready
    but was not asked for belongs to no state: a resumed run makes it again. An exception of the source is raised, as
    itself, where its chunk would have come.
    """

    def __init__(self, source: Source, n_chunks: int, device: torch.device):
        self.source, self.n_chunks, self.device = source, n_chunks, device

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        """The chunks; closing the generator ends its thread, at the latest after the chunk in hand."""
        reader = Reader(iter(self.source), self.n_chunks, self.device)
        reader.start()
        atexit.register(reader.stop, EXIT_SECONDS)
        unregister = atexit.unregister  # held here: at the interpreter's end the module may go before this generator
        try:
            yield from reader.chunks()
        finally:
            reader.stop()
            unregister(reader.stop)


class Reader(threading.Thread):
    """Draws chunks while there are free places, each on the device's side stream, finished before it is handed over."""

    def __init__(self, source: Iterator[Chunk], n_places: int, device: torch.device):
        super().__init__(name="prefetch", daemon=True)
        self.source = source
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._n_threads = torch.get_num_threads()
        self._places = threading.Semaphore(n_places)
        self._ready: SimpleQueue[Chunk | BaseException | None] = SimpleQueue()
        self._stopping = False

    def run(self) -> None:
        # A thread starts with torch's current global number of threads, which the main thread may just have lowered
        # (threads.py); the bits of a product depend on it. The getter makes torch initialise before we set.
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
        """What the thread drew, as it becomes ready."""
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item.rows.is_cuda:  # its memory must not go back to the side stream before the reader's work is done
                item.rows.record_stream(torch.cuda.current_stream(item.rows.device))
            yield item
            self._places.release()

    def stop(self, seconds: float | None = None) -> None:
        self._stopping = True
        self._places.release()
        self.join(seconds)
