"""Pack the token ids of documents into rows of one length."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sae_lab.text.encoding import Ids


class Packer:
    """Packs documents, which come in pieces, into rows of `seq_len` token ids: BOS, then tokens. No padding.

        doc 1: a b c d e   doc 2: f g h   seq_len 4
        pack=True    [BOS a b c] [BOS d e BOS] [BOS f g h]     documents are joined by BOS; no token is lost
        pack=False   [BOS a b c] [BOS f g h]                   no row crosses documents; unfilled rows are dropped

    If a document begins at the start of a row, the row has one BOS, not two. Documents without tokens are skipped. The
    pieces of a document are joined without BOS.

    So all rows behind their first BOS are one sequence, cut every seq_len - 1 tokens, in which a BOS precedes each
    document that does not begin at a cut. `state_dict()` holds the tokens that do not fill a row yet.

    With `gives_bos` documents may hold BOS themselves, at their beginning or inside. A row then has one BOS at its
    beginning, not two, and there is one between documents, not two.
    """

    def __init__(self, seq_len: int, bos_id: int, pack: bool, dtype: DTypeLike, gives_bos: bool = False):
        self.seq_len, self.bos_id, self.pack, self.gives_bos = seq_len, bos_id, pack, gives_bos
        self.dtype = np.result_type(dtype, np.min_scalar_type(bos_id)).newbyteorder("<")
        self.bos = np.array([bos_id], self.dtype)
        self.carry = np.empty(0, self.dtype)
        self.n_rows = self.n_tokens = 0  # the tokens of the documents, without BOS
        self.unplaced = 0  # documents that have begun, but have had no token so far
        self.bos_ahead = False  # whether the document has a BOS before its next token

    def state_dict(self) -> dict[str, Any]:
        counts = {"rows": self.n_rows, "tokens": self.n_tokens, "unplaced": self.unplaced}
        return {"carry": self.carry.tolist(), "bos_ahead": self.bos_ahead, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.carry = np.array(state["carry"], self.dtype)
        self.n_rows, self.n_tokens, self.unplaced = state["rows"], state["tokens"], state["unplaced"]
        self.bos_ahead = state.get("bos_ahead", False)

    def add(self, pieces: Iterable[tuple[bool, Ids]]) -> tuple[NDArray[Any], list[int]]:
        """Return the rows that are filled now, and the starts of the documents placed now.

        A start is the position of a document's first token in all rows, written one after another. A document of
        which no token is kept has the start of the next one.

        Args:
            pieces: for each, whether a document begins with it, and its token ids.
        """
        sequence, starts = Sequence(self.carry), []
        for begins, ids in pieces:
            self.unplaced += begins
            parts = self._between_bos(ids) if self.gives_bos else [ids]
            for n, part in enumerate(parts):
                self.bos_ahead |= n > 0
                if len(part):
                    starts += self._begin(sequence)
                    sequence.append(part)
                    self.n_tokens += len(part)
        rows, self.carry = self._cut(sequence.joined())
        self.n_rows += len(rows)
        return rows, starts

    def _between_bos(self, ids: Ids) -> list[Ids]:
        """Return the ids before, between and after the BOS among them."""
        at = np.flatnonzero(ids == self.bos_id)
        return [ids[a:b] for a, b in zip([0, *(at + 1)], [*at, len(ids)], strict=True)]

    def _begin(self, sequence: "Sequence") -> list[int]:
        """Put BOS where the next tokens need one; return the starts of the documents that begin with them."""
        filled = len(sequence) % (self.seq_len - 1)
        if filled and self.unplaced and not self.pack:
            sequence.drop(filled)
        elif filled and (self.unplaced or self.bos_ahead):
            sequence.append(self.bos)
        starts, self.unplaced, self.bos_ahead = [self.position(len(sequence))] * self.unplaced, 0, False
        return starts

    def finish(self) -> list[int]:
        """Return the starts of the documents after the last one with tokens: the end."""
        starts, self.unplaced = [self.position(len(self.carry))] * self.unplaced, 0
        return starts

    def position(self, i: int) -> int:
        """Return the position, in all rows, of token i of the sequence that begins with the carry."""
        row, column = divmod(i, self.seq_len - 1)
        return (self.n_rows + row) * self.seq_len + 1 + column

    def _cut(self, tokens: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the full rows, and a copy of the tokens that are left."""
        n = len(tokens) // (self.seq_len - 1)
        end = n * (self.seq_len - 1)
        rows = np.empty((n, self.seq_len), self.dtype)
        rows[:, 0] = self.bos_id
        rows[:, 1:] = tokens[:end].reshape(n, self.seq_len - 1)
        return rows, tokens[end:].copy()


class Sequence:
    """Arrays that will be joined, and their total length."""

    def __init__(self, first: NDArray[Any]):
        self.parts, self.length = [first], len(first)

    def __len__(self) -> int:
        return self.length

    def append(self, part: NDArray[Any]) -> None:
        self.parts.append(part)
        self.length += len(part)

    def drop(self, n: int) -> None:
        """Drop the last n tokens."""
        self.length -= n
        while n:
            last = self.parts.pop()
            if len(last) > n:
                self.parts.append(last[:-n])
            n -= min(n, len(last))

    def joined(self) -> NDArray[Any]:
        return np.concatenate(self.parts)
