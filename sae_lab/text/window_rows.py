"""Rows of documents that can only be read in order, shuffled within windows. A process reads the next window ahead."""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray as Array
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.signals import raise_if_stopped
from sae_lab.text.documents import Documents, Place, Window, cut_documents, take_batches
from sae_lab.text.encoding import TOGETHER, Encode
from sae_lab.text.packing import Packer
from sae_lab.text.permutation import permute
from sae_lab.text.rows import raise_no_rows, warn_of_new_pass

SMALLEST = 2**20
"""Tokens of the first window. Each later one is as large as all before it together, up to the maximum."""


class Request(NamedTuple):
    """A window of at least `tokens` tokens of pass `epoch`, from `place` on (None: the beginning)."""

    epoch: int
    place: Place | None
    tokens: int


class Rows(NamedTuple):
    """The rows of a window, the place after them (None if the pass ends), and whether there were tokens at all."""

    rows: Int[Array, "r t"]
    after: Place | None
    any_tokens: bool


class WindowReader:
    """Reads documents, tokenizes and packs them, window by window. An unfilled last row of a window is dropped."""

    def __init__(self, documents: Documents, encode: Encode, seq_len: int, bos_id: int, pack: bool):
        self.documents, self.encode = documents, encode
        self.packing = (seq_len, bos_id, pack)
        self._windows: Iterator[Window] = iter(())
        self._at: tuple[int, Place | None] | None = None  # where `_windows` continues

    def read(self, request: Request) -> Rows:
        if self._at != (request.epoch, request.place) or request.place is None:
            self._windows = self.documents.windows(request.epoch, request.place)
        packer = Packer(*self.packing, self.encode.dtype)
        rows, after = [np.empty((0, packer.seq_len), packer.dtype)], request.place
        while packer.n_rows * packer.seq_len < request.tokens:
            window = self._next_window()
            after = None if window is None else window.after
            if window is None:
                break
            for batch in take_batches(cut_documents(window.texts), TOGETHER):
                ids = self.encode([piece.text for piece in batch])
                rows.append(packer.add((piece.piece == 0, own) for piece, own in zip(batch, ids, strict=True))[0])
        self._at = (request.epoch, after)
        return Rows(np.concatenate(rows), after, packer.n_tokens > 0)

    def anew(self) -> "WindowReader":
        """Return a reader of the same text that stands nowhere, so that it can be sent to another process."""
        return WindowReader(self.documents, self.encode, *self.packing)

    def _next_window(self) -> Window | None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit  # this process reads ahead for one that was killed
        return next(self._windows, None)


class ReaderProcess:
    """A process that answers requests for windows. Killing it loses nothing: a window can be read again.

    Not a DataLoader: its worker's death raises an exception in the main thread wherever that is, also between the two
    halves of a save. Spawned, not forked, because Rust's and CUDA's threads do not survive a fork.
    """

    def __init__(self, reader: WindowReader):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=answer_requests, args=(theirs, reader.anew()), name="text", daemon=True)
        self.process.start()
        theirs.close()
        self.requested: Request | None = None

    def request(self, request: Request) -> None:
        self.connection.send(request)
        self.requested = request

    def receive(self) -> Rows:
        """Return the window that was requested.

        Raises:
            UserError: the process died. Errors of the text are raised here unchanged.
        """
        try:
            while not self.connection.poll(1.0):
                raise_if_stopped()
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise_if_stopped()
            self.process.join()
            raise UserError(
                f"the process that reads the text ahead died (exit code {self.process.exitcode}): run the same command "
                "again to continue. If it is killed again, lower data.window_tokens."
            ) from None
        self.requested = None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def answer_requests(connection: Connection, reader: WindowReader) -> None:
    """Read the windows that are asked for, until nobody is there to ask. Signals that stop the run are left to it."""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            answer: Rows | Exception = reader.read(request)
        except Exception as e:
            answer = e
        connection.send(answer)


class WindowRows:
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
        while n and (rows := self._open_window()) is not None:
            numbers = np.arange(self.row, min(self.row + n, len(rows)))
            taken.append(rows[permute(numbers, len(rows), self.seed, self.epoch, self.before)])
            self.row, n = self.row + len(numbers), n - len(numbers)
        return torch.from_numpy(np.concatenate(taken, dtype=np.int64))

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
