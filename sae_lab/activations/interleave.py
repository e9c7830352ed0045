"""Interleave harvest and training on a GPU: one thread launches both, on two CUDA streams."""

from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from sae_lab.activations.source import Chunk, Launched, Source
from sae_lab.parallel.mesh import world_size
from sae_lab.runtime.signals import raise_if_stopped


class LaunchingSource(Source, Protocol):
    """A Source that can yield chunks which a GPU is still computing."""

    n_at_once: int
    """Chunks of this rank that are computed side by side."""

    def launch(self) -> Generator[Launched, None, None]: ...


class InterleavedSource:
    """A Source whose next chunks are launched by `prepare`, between the steps that train on earlier ones.

    Nothing waits for the GPU before a chunk is handed over, so its forward passes run beside the training steps, and
    no second thread competes for Python's interpreter lock. On a CPU a chunk is computed where it is launched.

    Chunks and their order are unchanged. Each carries the state from which it can be computed again, so chunks that
    were launched but not used are in no checkpoint. An exception in the source is raised unchanged, in place of the
    chunk that failed.

    Args:
        source: the source to launch.
        device: the device that computes the chunks. If it is a GPU, they are computed on a stream of their own.
    """

    def __init__(self, source: LaunchingSource, device: torch.device):
        self.source, self.device = source, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chunks: Generator[Launched, None, None] | None = None
        self._launched: deque[Launched | Exception] = deque()
        self._n_rows = 0
        """Rows that are launched and not handed over."""

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        """Yield the chunks. Closing the generator drops those that were not handed over."""
        if self.stream is not None:  # what was launched before, such as copies of the weights, comes first
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._chunks = self.source.launch()
        try:
            while self._launched or self._launch():
                yield self._hand_over()
        finally:
            self._chunks.close()
            self._launched.clear()
            self._n_rows = 0

    def prepare(self, now: int, soon: int) -> None:
        """Launch chunks until `now` rows are launched and not handed over, or the source ends.

        Where several devices compute chunks, keep each of them at work while some of the next `soon` rows are missing.

        Raises:
            SafeStop: a signal arrived. What was launched is kept.
        """
        more, at_once = True, self.source.n_at_once if now else 1
        least = 0 if at_once == 1 else 2 * at_once * world_size()
        while more and (self._n_rows < now or (self._n_rows < soon and len(self._launched) < least)):
            raise_if_stopped()
            more = self._launch()

    def _launch(self) -> bool:
        """Launch a chunk. Returns False at the end of the source."""
        assert self._chunks is not None
        try:
            with self._on_stream():
                item: Launched | Exception | None = next(self._chunks, None)
        except Exception as e:
            item = e
        if item is None:
            return False
        self._launched.append(item)
        self._n_rows += 0 if isinstance(item, Exception) else len(item.chunk.rows)
        return True

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _hand_over(self) -> Chunk:
        """Return the first launched chunk when it is computed and found to be finite."""
        item = self._launched.popleft()
        if isinstance(item, Exception):
            raise item
        self._n_rows -= len(item.chunk.rows)
        chunk = item.wait()
        if chunk.rows.is_cuda:  # in use by the other stream from now on, and not free before that has read it
            chunk.rows.record_stream(torch.cuda.current_stream(chunk.rows.device))
        return chunk
