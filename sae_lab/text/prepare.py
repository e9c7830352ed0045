"""The documents of local files, converted once to an Arrow table in the cache of `datasets`, which is memory-mapped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.builder import Key

from sae_lab.runtime.errors import UserError
from sae_lab.text.contents import Chat, Content, Document, Tokens
from sae_lab.text.readers import clean, documents_of

VERSION = "1"  # of the conversion: a cached table of another version is not used
BATCH = 2**24  # characters that are written together


@dataclass
class TextsConfig(datasets.BuilderConfig):
    """The files to convert, their format, and which columns hold the documents."""

    files: Sequence[Path] = ()
    format: str = "text"
    content: Content | None = None


class Texts(datasets.ArrowBasedBuilder):
    """A table with a row per document: `text`, and `damaged`, whether it holds U+FFFD in the place of bad bytes.

    The text of a chat is JSON. Token ids are `ids`, and where they are is `text`.
    """

    BUILDER_CONFIG_CLASS = TextsConfig

    def _info(self) -> datasets.DatasetInfo:
        ids = {"ids": datasets.List(datasets.Value("int64"))} if self.config.content.kind == "tokens" else {}
        features = datasets.Features({"text": datasets.Value("string"), "damaged": datasets.Value("bool"), **ids})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": self.config.files})]

    def _generate_shards(self, files: Sequence[Path]) -> Iterator[str]:
        yield from map(str, files)

    def _generate_tables(self, files: Sequence[Path]) -> Iterator[tuple[Key, pa.Table]]:
        for i, file in enumerate(files):
            for n, documents in enumerate(batches(documents_of(file, self.config.format, self.config.content))):
                yield Key(i, n), table_of(documents)


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents, of BATCH characters or token ids each or a little more."""
    batch, length = list[Document](), 0
    for text in documents:
        batch.append(text)
        length += len(text) + 1
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def table_of(documents: list[Document]) -> pa.Table:
    """Return a table of the documents, whose texts are valid UTF-8."""
    texts = [text_in_table(document) for document in documents]
    ids = [document.ids for document in documents if isinstance(document, Tokens)]
    try:
        column, damaged = pa.array(texts, pa.string()), [False] * len(texts)
    except UnicodeEncodeError:
        cleaned = [clean(text) for text in texts]
        damaged = [a != b for a, b in zip(cleaned, texts, strict=True)]
        column = pa.array(cleaned, pa.string())
    table = pa.table({"text": column, "damaged": pa.array(damaged, pa.bool_())})
    return table.append_column("ids", pa.array(ids, pa.list_(pa.int64()))) if ids else table


def text_in_table(document: Document) -> str:
    if isinstance(document, str):
        return document
    return document.to_json() if isinstance(document, Chat) else document.where


def from_table(table: pa.Table, content: Content) -> list[Document]:
    """Return the documents of rows of the table."""
    texts = table["text"].to_pylist()
    if content.kind == "text":
        return texts
    if content.kind == "chat":
        return [Chat.from_json(text) for text in texts]
    return [Tokens(ids.values.to_numpy(), where) for ids, where in zip(table["ids"], texts, strict=True)]


def prepare(files: Sequence[Path], format: str, content: Content) -> datasets.Dataset:
    """Return the documents of the files as a table.

    They are converted again if the size or the time of a file has changed.

    Raises:
        UserError: a file cannot be read. The sentence names it.
    """
    of_kind = [] if content.kind == "text" else [content.kind]
    stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    known = [VERSION, format, *of_kind, *content.columns, *stats]
    fingerprint = xxhash.xxh3_128(repr(known).encode("utf-8", "surrogateescape")).hexdigest()
    builder = Texts(dataset_name="sae_lab_texts", config_id=fingerprint, files=files, format=format, content=content)
    try:
        builder.download_and_prepare(verification_mode="no_checks")
    except datasets.exceptions.DatasetGenerationError as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise (cause or e) from None if cause else e.__cause__
    return builder.as_dataset(split="train")
