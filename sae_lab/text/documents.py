"""The contract of a text source: passes over documents, each shuffled differently, that can start at any place."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import SEEK_END
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash

from sae_lab.runtime.files import digest_of_json
from sae_lab.text.contents import TEXT, Chat, Document, Tokens
from sae_lab.text.notes import Note

TRAIN, HELD_OUT = "train", "held_out"
WINDOW = 2**23  # characters that are read together and shuffled
END = 2**20  # bytes at the beginning and at the end of a file that a quick digest reads
PIECE = 2**16  # maximum characters of a piece: longer documents are cut, so that they are shuffled too

Place = dict[str, Any]  # where a window begins; plain values, because a checkpoint stores it


class Window(NamedTuple):
    """Consecutive documents of a pass, the place where they begin, and the place where the next window begins.

    place["window"] is the window's number.
    """

    place: Place
    texts: list[Any]  # Document
    after: Place


class Piece(NamedTuple):
    """A document, or a part of a long one: the n-th piece of its window after shuffling.

    `text` may be an array of token ids, here and below.
    """

    place: Place
    n: int
    text: Any


class DocumentPiece(NamedTuple):
    """Piece number `piece` of document number `document`, in the order of the documents."""

    document: int
    piece: int
    text: Any
    note: Note | None = None


class HasText(Protocol):
    @property
    def text(self) -> Any: ...


AnyPiece = TypeVar("AnyPiece", bound=HasText)


class Documents(ABC):
    """A text source: every pass yields the same documents in a different order.

    Attributes:
        kinds: which kinds of documents there are: "text", "chat", "tokens" (see contents.py).

    A pass is read in windows of WINDOW characters. Documents are cut into pieces of at most PIECE characters, and the
    pieces of a window are shuffled by (seed, pass, window). To start at a piece, only its window has to be read.
    """

    kinds: frozenset[str] = TEXT

    def __init__(self, seed: int, split: str = TRAIN):
        # The order of held-out documents does not depend on the seed, so all runs are evaluated on the same text.
        self.seed = seed if split == TRAIN else 0

    @abstractmethod
    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        """Yield the windows of pass `epoch`, starting with the one at `place`; None is the first one."""

    def digest(self, thorough: bool = True) -> str:
        """Return a digest that changes when the text changes; empty if this source has none.

        Args:
            thorough: read all of the text; otherwise only enough of it to notice most changes.
        """
        return ""

    def describe(self) -> str:
        """Return one line that tells the user what is read; empty if there is nothing to tell."""
        return ""

    def pieces(
        self,
        epoch: int,
        place: Place | None = None,
        first: int = 0,
        cut_one: Callable[[Any], Sequence[Any]] | None = None,
    ) -> Iterator[Piece]:
        """Yield the pieces of pass `epoch`, starting with number `first` of the window at `place`.

        Args:
            cut_one: returns the pieces of a document; None: the documents are text.
        """
        for window in self.windows(epoch, place):
            texts = [piece for text in window.texts for piece in (cut_one or cut)(text)]
            order = permutation(len(texts), self.seed, epoch, window.place["window"])
            for n in range(first, len(order)):
                yield Piece(window.place, n, texts[order[n]])
            first = 0


class IndexedDocuments(Documents):
    """A text source with random access to its documents: pass `epoch` is a permutation drawn from (seed, epoch)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Document: ...

    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        order = permutation(len(self), self.seed, epoch)
        place = place or {"window": 0, "first": 0}
        while texts := take_window(self[i] for i in order[place["first"] :]):
            after = {"window": place["window"] + 1, "first": place["first"] + len(texts)}
            yield Window(place, texts, after)
            place = after

    def fingerprint(self) -> str:
        """Return a digest that changes when the text changes, fast enough for the start of every run.

        Reads all documents, unless a subclass knows something faster (`stamp_of` its files).
        """
        digest = xxhash.xxh3_128()
        for text in self.in_order():
            digest.update(as_bytes(text) + b"\xff")
        return digest.hexdigest()

    def batch(self, numbers: Sequence[int]) -> list[Any]:
        """Return the documents of these numbers. A subclass may know a faster way than one by one."""
        return [self[i] for i in numbers]

    def in_order(self, first: int = 0) -> Iterator[Document]:
        """Yield the documents from number `first` on; short ones are read together, about WINDOW characters at most."""
        n = 1
        while first < len(self):
            texts = self.batch(range(first, min(first + n, len(self))))
            yield from texts
            first += len(texts)
            n = max(1, min(2 * n, WINDOW * len(texts) // (1 + sum(map(len, texts))), 1024))


def as_bytes(document: Document) -> bytes:
    if isinstance(document, Tokens):
        return document.ids.astype("<i8").tobytes()
    text = document.to_json() if isinstance(document, Chat) else document
    return text.encode("utf-8", "surrogatepass")


def digest_of(files: Iterable[Path], thorough: bool = True) -> str:
    """Return a digest of the files' contents, in this order. A gigabyte takes about a second.

    Unless `thorough`, only the size and both ends (END bytes each) of a large file are read.
    """
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


def stamp_of(files: Sequence[Path]) -> str:
    """Return a digest of the files' sizes, times of change and, quickly, contents (`digest_of`)."""
    stats = [file.stat() for file in files]
    return digest_of_json([digest_of(files, thorough=False), [(s.st_size, s.st_mtime_ns) for s in stats]])


def describe_documents(documents: Callable[[str], Documents]) -> dict[str, Any]:
    """Return the class and the arguments of a `functools.partial`, as plain values."""
    if not isinstance(documents, functools.partial):
        return {"documents": getattr(documents, "__qualname__", repr(documents))}
    arguments = inspect.signature(documents.func).bind_partial(*documents.args, **documents.keywords).arguments
    return {"documents": documents.func.__name__} | arguments


def cut(text: Any) -> list[Any]:
    """Cut a text into pieces of at most PIECE characters, or an array into pieces of so many token ids."""
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def cut_documents(
    texts: Iterable[Any],
    cut_one: Callable[[Any], tuple[Sequence[Any], Note | None]],
    document: int = 0,
    piece: int = 0,
) -> Iterator[DocumentPiece]:
    """Yield the pieces of consecutive documents. An empty document is one empty piece.

    Args:
        texts: the documents.
        cut_one: returns the pieces of a document, and the note that its first piece gets.
        document: number of the first one.
        piece: number of its first piece.
    """
    for i, text in enumerate(texts, document):
        parts, note = cut_one(text)
        for n, part in enumerate([*parts] or [""]):
            if n >= piece:
                yield DocumentPiece(i, n, part, note if n == 0 else None)
        piece = 0


def take_batches(pieces: Iterable[AnyPiece], characters: int) -> Iterator[list[AnyPiece]]:
    """Group consecutive pieces into lists of about so many characters."""
    batch: list[AnyPiece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64  # that many empty pieces take memory, too
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def take_window(texts: Iterator[Any]) -> list[Any]:
    """Return the next documents until they hold WINDOW characters or more; fewer at the end."""
    taken, length = [], 0
    for text in texts:
        taken.append(text)
        length += len(text)
        if length >= WINDOW:
            break
    return taken


def permutation(n: int, *key: int) -> list[int]:
    """Return a permutation of range(n), drawn from the key."""
    return np.random.default_rng(key).permutation(n).tolist()
