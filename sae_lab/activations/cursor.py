"""The place in a source up to which its rows were read."""

from collections.abc import Generator
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.source import Chunk, Source

Place: TypeAlias = tuple[dict[str, Any], int]
"""The state of a chunk, and how many of its rows come before."""


class Cursor:
    """Reads the rows of a source one after the other, and knows its place."""

    def __init__(self, source: Source):
        self.source = source
        self._chunks: Generator[Chunk, None, None] | None = None

    def go_to(self, place: Place) -> None:
        """Close the source. It is opened at this place when a row is looked for."""
        if self._chunks is not None:
            self._chunks.close()
        self._chunks, self._start = None, place
        self._chunk: Chunk | None = None  # the chunk being read, and how many of its rows have been read
        self._used = 0

    def find_row(self) -> bool:
        """Go to the chunk that holds the next row. Returns False at the end of the source; the last chunk is kept."""
        if self._chunks is None:
            state, self._used = self._start
            self.source.load_state_dict(state)
            self._chunks = iter(self.source)
            self._chunk = next(self._chunks, None)
        while self._chunk is not None and self._used >= len(self._chunk.rows):
            if (following := next(self._chunks, None)) is None:
                return False
            self._chunk, self._used = following, self._used - len(self._chunk.rows)
        return self._chunk is not None

    @property
    def chunk(self) -> Chunk:
        """The chunk of the last row that was looked for."""
        assert self._chunk is not None
        return self._chunk

    def take(self, n: int) -> Float[Tensor, "m s d"]:
        """Return the next n rows, or as many as the chunk has."""
        rows = self.chunk.rows[self._used : self._used + n]
        self._used += len(rows)
        return rows

    @property
    def place(self) -> Place:
        return self.chunk.state, self._used

    @property
    def n_left(self) -> int:
        """Rows of the chunk that were not read."""
        return max(0, len(self.chunk.rows) - self._used)
