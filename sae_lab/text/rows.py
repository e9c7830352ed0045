"""Rows of token ids as a stream that can stop and continue at any row; and that in the order of the documents."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.text.current_part import part_or
from sae_lab.text.documents import Documents, Piece, take_batches
from sae_lab.text.encoding import Encode
from sae_lab.text.notes import Notes

log = logging.getLogger(__name__)

AHEAD = 2**18  # characters that are tokenized together
SKIPPED_AT_ONCE = 4096  # rows, where they have to be read to be skipped


class RowStream(Protocol):
    """Rows of token ids, `seq_len` each, in an order that is a function of (text, seed).

    After the last row the stream starts a new pass in a new order and logs a warning; without `repeat` it ends. The
    state is the position of the next row, in plain values. A stream that loads it continues exactly there.
    """

    def take(self, n: int) -> Int[Tensor, "r t"]:
        """Return the next n rows, or as many as are left."""
        ...

    def skip(self, n: int) -> int:
        """Go on as `take` does, without the rows. Returns their number. Reads no text where rows have numbers."""
        skipped = 0
        while skipped < n and (taken := len(self.take(min(n - skipped, SKIPPED_AT_ONCE)))):
            skipped += taken
        return skipped

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Free memory and processes. The position is kept: `take` can continue."""
        ...


def raise_no_rows(seq_len: int, pack: bool, any_tokens: bool = False) -> None:
    """Raise the UserError about a text that fills no row in a whole pass."""
    if pack and not any_tokens:
        raise UserError("the data hold no text: check data.paths, or data.path and data.hub_split.")
    if pack:
        raise UserError(f"the text is shorter than one row of seq_len={seq_len} tokens: give more text.")
    raise UserError(f"no document fills a row of seq_len={seq_len}: lower seq_len, or set data.pack=true.")


def without_repeated(ids: list[int], bos_id: int) -> list[int]:
    """Return the ids without each BOS that follows a BOS."""
    return [i for n, i in enumerate(ids) if n == 0 or i != bos_id or ids[n - 1] != bos_id]


def warn_of_new_pass(epoch: int) -> None:
    log.warning("End of %s: starting pass %d over it, in a new order.", part_or("the text"), epoch + 1)


class NextRows(RowStream):
    """The next n rows of a stream, or as many as are left. Closing them leaves the stream open."""

    def __init__(self, stream: RowStream, n: int):
        self.stream, self.left = stream, n

    def take(self, n: int) -> Int[Tensor, "r t"]:
        rows = self.stream.take(min(n, self.left))
        self.left -= len(rows)
        return rows

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        pass


class TextRows(RowStream):
    """A RowStream in the order in which pieces of documents are read (`data.order=as_read`), packed row by row.

        doc 1: a b c d e   doc 2: f g h   seq_len 4
        pack=True    [BOS a b c] [BOS d e BOS] [BOS f g h]     documents are joined by BOS; no token is lost
        pack=False   [BOS a b c] [BOS f g h]                   no row crosses documents; unfilled rows are dropped

    If a document begins at the start of a row, the row has one BOS, not two. Documents without tokens are skipped. Each
    piece of a long document counts as a document. With `repeat=False` the last row is dropped if it is not full.

    Raises:
        UserError: `seq_len` leaves no room for text, the documents hold no text, or with `pack=False` no document fills
            a row.
    """

    START: dict[str, Any] = {"epoch": 0, "window": None, "piece": 0, "token": 0}

    def __init__(
        self, documents: Documents, encode: Encode, seq_len: int, bos_id: int, repeat: bool = True, pack: bool = True
    ):
        if seq_len < 2:
            raise UserError(f"seq_len={seq_len} leaves no room for text after BOS: it must be 2 or more.")
        self.documents, self.encode, self.seq_len, self.bos_id = documents, encode, seq_len, bos_id
        self.repeat, self.pack = repeat, pack
        self.gives_bos, self.notes = encode.gives_bos(documents.kinds), Notes()
        self.load_state_dict(self.START)

    def take(self, n: int) -> Int[Tensor, "r t"]:
        return torch.tensor(list(islice(self, n)), dtype=torch.long).view(-1, self.seq_len)

    def skip(self, n: int) -> int:
        return sum(1 for _ in islice(self, n))

    def close(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "window": self.window, "piece": self.piece, "token": self.token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.window, self.piece, self.token = (state[key] for key in self.START)
        self._pieces: Iterator[tuple[Piece, list[int]]] | None = None
        self._ids: list[int] | None = None
        self._useful = state != self.START  # whether this pass has contributed to a row so far

    def __iter__(self) -> "TextRows":
        return self

    def __next__(self) -> list[int]:
        row = [self.bos_id]
        while len(row) < self.seq_len:
            ids = self._piece()
            if len(row) == 1 and (self.token == 0 or (self.gives_bos and ids[self.token] == self.bos_id)):
                self.token += 1  # the row's own BOS stands for the document's
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
            self._pieces = self._encoded(self.documents.pieces(self.epoch, self.window, self.piece, self._cut))
        while self._ids is None:
            piece, ids = next(self._pieces, (None, []))
            if piece is None:
                self._next_pass()
                continue
            self.window, self.piece = piece.place, piece.n
            if self.gives_bos:
                ids = without_repeated([self.bos_id, *ids, self.bos_id], self.bos_id)[1:-1]
            if ids:
                self._ids = [self.bos_id, *ids]
        return self._ids

    def _cut(self, document: Any) -> Sequence[Any]:
        pieces, note = self.encode.cut(document)
        self.notes.add(note)
        return pieces

    def _encoded(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        """Yield the pieces with their token ids; several are tokenized together."""
        for batch in take_batches(pieces, AHEAD):
            self.notes.tell(self.encode.told)
            ids = self.encode([piece.text for piece in batch])
            yield from zip(batch, (own.tolist() for own in ids), strict=True)

    def _next_pass(self) -> None:
        if not self._useful:
            raise_no_rows(self.seq_len, self.pack)
        if not self.repeat:
            raise StopIteration
        warn_of_new_pass(self.epoch + 1)
        self.load_state_dict(self.START | {"epoch": self.epoch + 1})
        self._useful = False
        self._pieces = self._encoded(self.documents.pieces(self.epoch, cut_one=self._cut))
