"""Read, tokenize and pack windows of documents, here or in a process that reads ahead.

Does not import torch, which would take that process seconds and 200 MB.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray as Array

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.signals import raise_if_stopped
from sae_lab.text.documents import Documents, Place, Window, cut_documents, take_batches
from sae_lab.text.encoding import TOGETHER, Encode
from sae_lab.text.notes import Notes
from sae_lab.text.packing import Packer


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
        packer, notes = Packer(*self.packing, self.encode.dtype, self.encode.gives_bos(self.documents.kinds)), Notes()
        rows, after = [np.empty((0, packer.seq_len), packer.dtype)], request.place
        while packer.n_rows * packer.seq_len < request.tokens:
            window = self._next_window()
            after = None if window is None else window.after
            if window is None:
                break
            for batch in take_batches(cut_documents(window.texts, self.encode.cut), TOGETHER):
                notes.add_all(batch)
                ids = self.encode([piece.text for piece in batch])
                rows.append(packer.add((piece.piece == 0, own) for piece, own in zip(batch, ids, strict=True))[0])
        if request.place is None:  # the first window, which no other process reads
            notes.tell(self.encode.told)
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
