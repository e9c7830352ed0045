"""Documents: text in passes, each in an order of its own, that can be entered anywhere. The bundled ones are here."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from os import SEEK_END
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

TRAIN, HELD_OUT = "train", "held_out"
WINDOW = 2**23  # characters of text that are read at once and mixed
END = 2**20  # bytes at either end of a file
PIECE = 2**16  # characters after which a document is cut, so that a long one is mixed like the others

Place = dict[str, Any]  # plain values, which a checkpoint may hold


class Window(NamedTuple):
    """Consecutive documents of a pass, and the place from which they are read again; place["window"] numbers them."""

    place: Place
    texts: list[str]


class Piece(NamedTuple):
    """A document, or a part of a long one: the n-th of its window, in the order of the pass."""

    place: Place
    n: int
    text: str


class Documents(ABC):
    """Text as a sequence of passes; every pass holds the same documents, each in an order of its own.

    A pass is read in windows of WINDOW characters. Documents are cut after PIECE characters, and the pieces of a window
    are permuted by (seed, pass, window). So the stream can be entered at any piece by reading no more than one window.
    """

    def __init__(self, seed: int, split: str = TRAIN):
        # Held-out documents come in one order, whatever the seed: all runs are judged on the same text.
        self.seed = seed if split == TRAIN else 0

    @abstractmethod
    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        """The windows of pass `epoch` from the one at `place` on; None is the first."""

    def digest(self, thorough: bool = True) -> str:
        """Of all the text that this may give, or else of enough to tell that it changed; empty where neither is known.

        Args:
            thorough: read everything through.
        """
        return ""

    def pieces(self, epoch: int, place: Place | None = None, first: int = 0) -> Iterator[Piece]:
        """Pass `epoch` from the `first`-th piece of the window at `place` on."""
        for window in self.windows(epoch, place):
            texts = [text[i : i + PIECE] for text in window.texts for i in range(0, len(text), PIECE)]
            order = permutation(len(texts), self.seed, epoch, window.place["window"])
            for n in range(first, len(order)):
                yield Piece(window.place, n, texts[order[n]])
            first = 0


class IndexedDocuments(Documents):
    """Documents that can be read in any order: pass `epoch` is a permutation drawn from (seed, epoch)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> str: ...

    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        order = permutation(len(self), self.seed, epoch)
        place = place or {"window": 0, "first": 0}
        while texts := take_window(self[i] for i in order[place["first"] :]):
            yield Window(place, texts)
            place = {"window": place["window"] + 1, "first": place["first"] + len(texts)}


def digest_of(files: Iterable[Path], thorough: bool = True) -> str:
    """Of what the files hold, in this order: a gigabyte takes about a second. Else of their sizes and ends only."""
    digest = xxhash.xxh3_128()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as f:
            if thorough or size <= 2 * END:
                while part := f.read(2**24):
                    digest.update(part)
            else:
                digest.update(str(size).encode() + f.read(END))
                f.seek(-END, SEEK_END)
                digest.update(f.read())
        digest.update(b"\0")
    return digest.hexdigest()


def take_window(texts: Iterator[str]) -> list[str]:
    """The next documents, up to the one with which they are WINDOW characters."""
    taken, length = [], 0
    for text in texts:
        taken.append(text)
        length += len(text)
        if length >= WINDOW:
            break
    return taken


def permutation(n: int, *key: int) -> list[int]:
    """The numbers below n, in an order drawn from the key."""
    return np.random.default_rng(key).permutation(n).tolist()
