"""Several texts in one stream of rows, by exact shares."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from numpy import ndarray as Array
from torch import Tensor

from sae_lab.runtime.files import digest_of_json
from sae_lab.text.current_part import reading_part
from sae_lab.text.documents import TRAIN
from sae_lab.text.rows import RowStream
from sae_lab.text.shares import next_parts
from sae_lab.text.text import Text, TrainingText

log = logging.getLogger(__name__)

DIGEST_ROWS = 32  # that stand for a part whose text has no digest


class Part(NamedTuple):
    """A text of a mixture: its key as the user types it after `data.`, its share as an integer, its rows."""

    key: str
    share: int
    text: Text


class MixedRows(RowStream):
    """A RowStream that takes each row from one of several streams, by the shares of the parts.

    Which part a row comes from is a function of the shares and of the rows taken before (`next_parts`). The rows of a
    part are those of its own stream, in its own order. A part that starts a new pass does so by itself; the mixture
    ends where a row is due from a part that has ended.

    Args:
        warn_of_end: called with the part that ended.
    """

    def __init__(self, parts: Sequence[Part], streams: Sequence[RowStream], warn_of_end: Callable[[Part, int], None]):
        self.parts, self.streams, self.warn_of_end = parts, streams, warn_of_end
        self.taken = [0] * len(parts)

    def take(self, n: int) -> Int[Tensor, "r t"]:
        rows = torch.empty(n, self.parts[0].text.seq_len, dtype=torch.long)

        def fill(stream: RowStream, places: Int64[Array, "m"]) -> int:
            own = stream.take(len(places))
            rows[places[: len(own)]] = own
            return len(own)

        return rows[: self._advance(n, fill)]

    def skip(self, n: int) -> int:
        return self._advance(n, lambda stream, places: stream.skip(len(places)))

    def _advance(self, n: int, move: Callable[[RowStream, Int64[Array, "m"]], int]) -> int:
        """Go on by n rows, or to the end of a part. Returns the number of rows.

        Args:
            move: goes on in the stream of a part by the rows at these places, and returns the number of rows.
        """
        order, end = np.array(next_parts([part.share for part in self.parts], self.taken, n), np.int64), n
        for i, (part, stream) in enumerate(zip(self.parts, self.streams, strict=True)):
            places = np.flatnonzero(order == i)
            with reading_part(part.key):
                moved = move(stream, places)
            end = min([end, *places[moved : moved + 1].tolist()])
        self.taken = [count + int((order[:end] == i).sum()) for i, count in enumerate(self.taken)]
        if end < n:
            self.warn_of_end(self.parts[order[end]], sum(self.taken))
        return end

    def state_dict(self) -> dict[str, Any]:
        return {"taken": list(self.taken), "parts": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = list(state["taken"])
        for stream, own in zip(self.streams, state["parts"], strict=True):
            stream.load_state_dict(own)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


class MixedText(TrainingText):
    """Texts of the same seq_len, pack and order, mixed by shares of rows, which are shares of tokens.

    Of every prefix of the rows, each part has its share to less than one row; also of the held-out rows. Those end with
    the part that has the fewest for its share.
    """

    def __init__(self, parts: Sequence[Part]):
        first = parts[0].text
        self.parts, self.seq_len, self.pack, self.order = parts, first.seq_len, first.pack, first.order
        self._ended = set[tuple[str, str]]()

    def rows(self, split: str, repeat: bool, n_tokens: int = 0) -> MixedRows:
        total, streams = sum(part.share for part in self.parts), list[RowStream]()
        for part in self.parts:
            with reading_part(part.key):
                streams.append(part.text.rows(split, repeat, -(-n_tokens * part.share // total)))

        def warn_of_end(part: Part, n_rows: int) -> None:
            if (split, part.key) not in self._ended:
                which = "training" if split == TRAIN else "held-out"
                log.warning("End of the %s text of data.%s: the mixture ends at row %d.", which, part.key, n_rows)
            self._ended.add((split, part.key))

        return MixedRows(self.parts, streams, warn_of_end)

    def prepare(self) -> None:
        for part in self.parts:
            with reading_part(part.key):
                part.text.prepare()

    def reading(self) -> dict[str, Any]:
        """Return how the documents of each part that are no plain text became ids."""
        return {part.key: reading for part in self.parts if (reading := part.text.reading())}

    def reader_digests(self) -> dict[str, str]:
        return {name: digest for part in self.parts for name, digest in part.text.reader_digests().items()}

    def identity(self) -> str:
        """Return a digest of the shares and the texts; a text without one is identified by its first rows."""
        identities = list[Any]()
        for part in self.parts:
            with reading_part(part.key):
                identities.append(part.text.identity() or part.text.first_rows(DIGEST_ROWS).tolist())
        return digest_of_json([[part.share for part in self.parts], identities])
