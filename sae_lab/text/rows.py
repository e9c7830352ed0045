"""Tokenize documents into packed rows of token ids: a stream that can stop and continue at any row."""

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
    """Iterator over rows of `seq_len` token ids: BOS, then tokens of the documents. No padding.

        doc 1: a b c d e   doc 2: f g h   seq_len 4
        pack=True    [BOS a b c] [BOS d e BOS] [BOS f g h]     documents are joined by BOS; no token is lost
        pack=False   [BOS a b c] [BOS f g h]                   no row crosses documents; unfilled rows are dropped

    If a document begins at the start of a row, the row has one BOS, not two. Documents without tokens are skipped.
    The tokenizer adds no special tokens, and text that looks like a special token is tokenized as plain text.

    After the last document the stream starts a new pass in a new order and logs a warning. With `repeat=False` it
    ends, and the last row is dropped if it is not full. `state_dict()` is the position of the next row; a stream that
    loads it continues exactly there.

    Raises:
        UserError: `seq_len` leaves no room for text, the documents hold no text, or with `pack=False` no document fills
            a row.
    """

    START: dict[str, Any] = {"epoch": 0, "window": None, "piece": 0, "token": 0}

    def __init__(
        self, documents: Documents, tokenizer: Any, seq_len: int, bos_id: int, repeat: bool = True, pack: bool = True
    ):
        if seq_len < 2:
            raise UserError(f"seq_len={seq_len} leaves no room for text after BOS: it must be 2 or more.")
        self.documents, self.tokenizer, self.seq_len, self.bos_id = documents, tokenizer, seq_len, bos_id
        self.repeat, self.pack = repeat, pack
        self.load_state_dict(self.START)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "window": self.window, "piece": self.piece, "token": self.token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.window, self.piece, self.token = (state[key] for key in self.START)
        self._pieces: Iterator[Piece] | None = None
        self._ids: list[int] | None = None
        self._useful = state != self.START  # whether this pass has contributed to a row so far

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
        """Return BOS and the token ids of the current piece; start the next pass if this one has ended."""
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
                raise UserError("the data hold no text: check data.paths, or data.path and data.hub_split.")
            raise UserError(f"no document fills a row of seq_len={self.seq_len}: lower seq_len, or set data.pack=true.")
        if not self.repeat:
            raise StopIteration
        log.warning("End of the text: starting pass %d over it, in a new order.", self.epoch + 2)
        self.load_state_dict(self.START | {"epoch": self.epoch + 1})
        self._useful = False
        self._pieces = self.documents.pieces(self.epoch)


def take_rows(rows: Iterator[list[int]], n: int) -> Int[Tensor, "n t"]:
    """Return the next n rows, or as many as are left."""
    return torch.tensor([row for _, row in zip(range(n), rows, strict=False)], dtype=torch.long)
