"""Documents -> packed rows of token ids: a stream that can be stopped and continued at any row."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.text.documents import Documents, Piece

log = logging.getLogger(__name__)


class TextRows:
    """Rows of `seq_len` token ids, BOS and then tokens of the documents. No padding.

        doc 1: a b c d e   doc 2: f g h   seq_len 4
        pack=True    [BOS a b c] [BOS d e BOS] [BOS f g h]     the documents joined by BOS; nothing lost
        pack=False   [BOS a b c] [BOS f g h]                   no row crosses documents; what does not fill one is lost

    A document boundary that falls on the start of a row is marked by the row's own BOS; a document without tokens is
    passed over. A tokenizer adds nothing of its own, and what looks like a special token in a document is text. When
    the documents end, the stream starts over in a new order and says so; with `repeat=False` it ends, and the last,
    unfilled row is dropped. `state_dict()` is the place of the next row; a stream given that state continues as if it
    had never stopped.

    Raises:
        UserError: a row too short to hold text, or documents without any, or none that fills a row of its own.
    """

    START: dict[str, Any] = {"epoch": 0, "window": None, "piece": 0, "token": 0}

    def __init__(
        self, documents: Documents, tokenizer: Any, seq_len: int, bos_id: int, repeat: bool = True, pack: bool = True
    ):
        if seq_len < 2:
            raise UserError(f"seq_len={seq_len} leaves no room for text after BOS: give 2 or more.")
        self.documents, self.tokenizer, self.seq_len, self.bos_id = documents, tokenizer, seq_len, bos_id
        self.repeat, self.pack = repeat, pack
        self.load_state_dict(self.START)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "window": self.window, "piece": self.piece, "token": self.token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.window, self.piece, self.token = (state[key] for key in self.START)
        self._pieces: Iterator[Piece] | None = None
        self._ids: list[int] | None = None
        self._useful = state != self.START  # whether this pass has held something for a row so far

    def __iter__(self) -> "TextRows":
        return self

    def __next__(self) -> list[int]:
        row = [self.bos_id]
        while len(row) < self.seq_len:
            ids = self._piece()
            if len(row) == 1 and self.token == 0:
                self.token = 1  # the row's own BOS stands for the document's
            taken = ids[self.token : self.token + self.seq_len - len(row)]
            row += taken
            self.token += len(taken)
            self._useful |= self.pack or len(row) == self.seq_len
            if self.token >= len(ids):
                self.piece, self.token, self._ids = self.piece + 1, 0, None
                if not self.pack and len(row) < self.seq_len:
                    row = [self.bos_id]
        return row

    def _piece(self) -> list[int]:
        """BOS and the ids of the piece at the cursor, opening the next pass where one ends."""
        if self._pieces is None:
            self._pieces = self.documents.pieces(self.epoch, self.window, self.piece)
        while self._ids is None:
            piece = next(self._pieces, None)
            if piece is None:
                self._next_pass()
                continue
            self.window, self.piece = piece.place, piece.n
            ids = self.tokenizer(piece.text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            if ids["input_ids"]:
                self._ids = [self.bos_id, *ids["input_ids"]]
        return self._ids

    def _next_pass(self) -> None:
        if not self._useful:
            if self.pack:
                raise UserError("the data hold no text: check data.paths, or the split that data=... names.")
            raise UserError(f"no document fills a row of seq_len={self.seq_len}: lower it, or give data.pack=true.")
        if not self.repeat:
            raise StopIteration
        log.warning("The text ended: it starts over in a new order (pass %d).", self.epoch + 2)
        self.load_state_dict(self.START | {"epoch": self.epoch + 1})
        self._useful = False
        self._pieces = self.documents.pieces(self.epoch)


def take_rows(rows: Iterator[list[int]], n: int) -> Int[Tensor, "n t"]:
    """The next n rows, or as many as are left."""
    return torch.tensor([row for _, row in zip(range(n), rows, strict=False)], dtype=torch.long)
