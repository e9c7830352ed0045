"""The text of a run: documents, how they become token ids, and the order of the rows."""

import errno
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from jaxtyping import Int
from torch import Tensor

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_json, locked
from sae_lab.runtime.user_cache import user_cache
from sae_lab.text.contents import TOKENS
from sae_lab.text.current_part import part_prefix
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents, IndexedDocuments, describe_documents
from sae_lab.text.encoding import Encode
from sae_lab.text.packing import Packer
from sae_lab.text.rows import RowStream, TextRows
from sae_lab.text.store import FORMAT, MANIFEST, TokenStore
from sae_lab.text.store_builder import StoreBuilder
from sae_lab.text.stored_rows import StoredRows
from sae_lab.text.window_reader import WindowReader
from sae_lab.text.window_rows import WindowRows

log = logging.getLogger(__name__)


class TextSource(ABC):
    """The first rows of a text. Enough for an evaluation."""

    seq_len: int

    @abstractmethod
    def first_rows(self, n: int) -> Int[Tensor, "r t"]:
        """Return the first n training rows, or as many as there are in one pass."""

    @abstractmethod
    def held_out(self, n: int) -> Int[Tensor, "r t"]:
        """Return the first n held-out rows, or as many as there are."""

    def reading(self) -> dict[str, Any]:
        """Return how documents that are no plain text became ids; empty for text."""
        return {}


class TrainingText(TextSource):
    """Rows of token ids of the splits `train` and `held_out`, as streams that can stop and continue."""

    pack: bool
    order: str

    @abstractmethod
    def rows(self, split: str, repeat: bool, n_tokens: int = 0) -> RowStream:
        """Return the rows of a split, from the beginning.

        Args:
            repeat: start a new pass over the text after its end.
            n_tokens: tokens that will be needed. Decides how far ahead is read.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Tokenize the text if it belongs in a store and is not there yet."""

    @abstractmethod
    def identity(self) -> str:
        """Return a digest that identifies the text; empty if its source has none."""

    @abstractmethod
    def reader_digests(self) -> dict[str, str]:
        """Return digests of what turns the documents into ids: the tokenizer, its chat template; none for token ids."""

    def first_rows(self, n: int) -> Int[Tensor, "r t"]:
        return self.rows(TRAIN, repeat=False).take(n)

    def held_out(self, n: int) -> Int[Tensor, "r t"]:
        return self.rows(HELD_OUT, repeat=False).take(n)


class Text(TrainingText):
    """Rows of token ids of the splits `train` and `held_out`.

    Args:
        documents: `documents(split)` returns the documents of a split.
        encode: turns pieces of documents into token ids.
        bos_id: token id that begins each row and separates documents.
        seq_len: tokens per row, BOS included.
        pack: join documents within a row; otherwise no row crosses documents, and rows that are not full are dropped.
        order: "shuffled" draws rows from the whole text. Documents with random access are tokenized into a store on
            disk first (TokenStore); others are shuffled within windows of rows. "as_read" takes rows in the order in
            which the documents are read, which is shuffled in windows of 8 M characters.
        window_tokens: tokens of such a window of rows; None: no limit.
    """

    @check_arguments
    def __init__(
        self,
        documents: Callable[[str], Documents],
        encode: Encode,
        bos_id: int,
        *,
        seq_len: Annotated[int, Ge(2)],
        pack: bool,
        order: Literal["shuffled", "as_read"],
        window_tokens: Annotated[int, Ge(1)] | None = None,
    ):
        self.documents, self.encode, self.bos_id = documents, encode, bos_id
        self.seq_len, self.pack, self.order, self.window_tokens = seq_len, pack, order, window_tokens
        self._described = False
        self._kinds: frozenset[str] | None = None
        self._open = functools.cache(self._open_store)

    def rows(self, split: str, repeat: bool, n_tokens: int = 0) -> RowStream:
        documents = self._documents(split)
        if self.order == "shuffled" and isinstance(documents, IndexedDocuments):
            return StoredRows(lambda: self._open(split), documents.seed, repeat, self.pack)
        if self.order == "shuffled" and split == TRAIN:
            reader = WindowReader(documents, self.encode, self.seq_len, self.bos_id, self.pack)
            return WindowRows(reader, documents.seed, repeat, self.window_tokens, n_tokens)
        return TextRows(documents, self.encode, self.seq_len, self.bos_id, repeat, self.pack)

    def prepare(self) -> None:
        self.identity()

    def kinds(self) -> frozenset[str]:
        """Return the kinds of the training documents: "text", "chat", "tokens"."""
        if self._kinds is None:
            self._kinds = self._documents(TRAIN).kinds
        return self._kinds

    def reading(self) -> dict[str, Any]:
        kinds = self.kinds()
        if not self.encode.gives_bos(kinds):
            return {}
        of_tokenizer = self.encode.digest(kinds)
        digest = of_tokenizer or self.identity()  # of the tokenizer and how it is used, or of the ids
        return {"kinds": sorted(kinds), "tokenizer_used": bool(of_tokenizer), "digest": digest}

    def reader_digests(self) -> dict[str, str]:
        kinds = self.kinds()
        if kinds == TOKENS:
            return {}
        of_chats = {"the chat template": self.encode.digest(kinds)} if "chat" in kinds else {}
        return {"the tokenizer": self.encode.digest(), **of_chats}

    def identity(self) -> str:
        documents = self._documents(TRAIN)
        if self.order == "shuffled" and isinstance(documents, IndexedDocuments):
            return digest_of_json([self._open(split).identity for split in (TRAIN, HELD_OUT)])
        return documents.digest(thorough=False)

    def _documents(self, split: str) -> Documents:
        documents = self.documents(split)
        if not self._described:
            self.encode.check(documents.kinds)
            if line := documents.describe():
                log.info("%s%s", part_prefix(), line)
        self._described = True
        return documents

    def _open_store(self, split: str) -> TokenStore:
        """Return the store of a split; build it first if there is none."""
        documents = self.documents(split)
        assert isinstance(documents, IndexedDocuments)
        key = self._key(split, documents)
        folder = user_cache() / "tokens" / digest_of_json(key)
        with explain_refusal(folder):
            if not (folder / MANIFEST).is_file():
                self._build_store(folder, key, documents)
        store = TokenStore(folder)
        store.notes.tell(self.encode.told)
        return store

    def _build_store(self, folder: Path, key: dict[str, Any], documents: IndexedDocuments) -> None:
        """Build a store, unless another process has built it while this one waited for the lock."""
        with locked(folder / ".lock", "Another process is tokenizing the same text: waiting for it.", patience=10.0):
            if not (folder / MANIFEST).is_file():
                bos = self.encode.gives_bos(documents.kinds)
                packer = Packer(self.seq_len, self.bos_id, self.pack, self.encode.dtype, bos)
                StoreBuilder(folder, key, documents, self.encode, packer).build()

    def _key(self, split: str, documents: IndexedDocuments) -> dict[str, Any]:
        """Return everything that decides a byte of a store. The seed decides none."""
        described = {name: str(value) for name, value in describe_documents(self.documents).items() if name != "seed"}
        known = isinstance(self.documents, functools.partial)  # otherwise its arguments are not known: read all
        fingerprint = documents.fingerprint() if known else IndexedDocuments.fingerprint(documents)
        packing = {"bos_id": self.bos_id, "seq_len": self.seq_len, "pack": self.pack}
        text = {"split": split, "text": fingerprint, "tokenizer": self.encode.digest(documents.kinds)}
        return {"format": FORMAT, **described, **text, **packing}


@contextmanager
def explain_refusal(folder: Path) -> Iterator[None]:
    """Turn the refusal to write a store into a UserError that says where else to put it."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
            raise
        raise UserError(
            f"{folder} cannot be written ({e.strerror}): set the environment variable SAE_LAB_CACHE to a folder that "
            "can be, or type data.order=as_read."
        ) from e
