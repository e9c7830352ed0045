"""Rows of documents that can only be read in order, shuffled within windows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray as Array
from torch import Tensor

from sae_lab.text.permutation import permute
from sae_lab.text.rows import RowStream, raise_no_rows, warn_of_new_pass
from sae_lab.text.window_reader import ReaderProcess, Request, Rows, WindowReader

SMALLEST = 2**20
"""Tokens of the first window. Each later one is as large as all before it together, up to the maximum."""


class WindowRows(RowStream):
    """A RowStream over a text without random access, shuffled within windows of `window_tokens` tokens.

    A window's rows are permuted by (seed, epoch, tokens before the window). The first windows are small, so that a run
    begins soon and a short one reads little. While one is used, a process reads the next one.

    Args:
        window_tokens: tokens of the largest window; None: no limit.
        n_tokens: tokens that the run needs. Nothing beyond is read ahead.
    """

    START: dict[str, Any] = {"epoch": 0, "place": None, "before": 0, "row": 0}

    def __init__(self, reader: WindowReader, seed: int, repeat: bool, window_tokens: int | None, n_tokens: int):
        self.reader, self.seed, self.repeat = reader, seed, repeat
        self.seq_len, _, self.pack = reader.packing
        self.window_tokens, self.n_tokens = window_tokens, n_tokens
        self._ahead: ReaderProcess | None = None
        self.load_state_dict(self.START)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "before": self.before, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place, self.before, self.row = (state[key] for key in self.START)
        self._useful = self.place is not None or self.row > 0  # whether this pass has had rows so far
        self.close()

    def close(self) -> None:
        self._window: Rows | None = None
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def take(self, n: int) -> Int[Tensor, "r t"]:
        taken = [np.empty((0, self.seq_len), np.int64)]
        for rows, numbers in self._advance(n):
            taken.append(rows[permute(np.array(numbers), len(rows), self.seed, self.epoch, self.before)])
        return torch.from_numpy(np.concatenate(taken, dtype=np.int64))

    def skip(self, n: int) -> int:
        return sum(len(numbers) for _, numbers in self._advance(n))

    def _advance(self, n: int) -> Iterator[tuple[Int[Array, "r t"], range]]:
        """Go on by n rows, or to the end. Yields the rows of each window on the way, and the numbers of those in it."""
        while n and (rows := self._open_window()) is not None:
            numbers = range(self.row, min(self.row + n, len(rows)))
            self.row, n = numbers.stop, n - len(numbers)
            yield rows, numbers

    def _open_window(self) -> Int[Array, "r t"] | None:
        """Return the rows of the window with the next row; None at the end of the text."""
        while self._window is None or self.row >= len(self._window.rows):
            if self._window is not None and self._window.after is not None:
                self.place, self.before = self._window.after, self.before + self._window.rows.size
                self.row = 0
            elif self._window is not None and not self._next_pass():
                return None
            self._window = self._read()
            self._useful |= len(self._window.rows) > 0
        return self._window.rows

    def _next_pass(self) -> bool:
        any_tokens = self._window is not None and self._window.any_tokens
        if not self._useful and (self.repeat or not (self.pack and any_tokens)):
            raise_no_rows(self.seq_len, self.pack, any_tokens)
        if self.repeat:
            self.epoch, self.place, self.row, self._useful = self.epoch + 1, None, 0, False
            warn_of_new_pass(self.epoch)
        return self.repeat

    def _read(self) -> Rows:
        """Return the window at the current position, and begin to read the one after it."""
        request = Request(self.epoch, self.place, self._size(self.before))
        if self._ahead is not None and self._ahead.requested == request:
            window = self._ahead.receive()
        else:
            window = self.reader.read(request)
        before = self.before + window.rows.size
        if window.after is not None and before < self.n_tokens:
            self._ahead = self._ahead or ReaderProcess(self.reader)
            self._ahead.request(Request(self.epoch, window.after, self._size(before)))
        return window

    def _size(self, before: int) -> int:
        """Return the tokens of the window that begins after so many tokens."""
        limit = before if self.window_tokens is None else min(before, self.window_tokens)
        return max(SMALLEST, limit)
