"""The texts of local files, converted once to an Arrow table in the cache of `datasets`, which is memory-mapped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.builder import Key

from sae_lab.runtime.errors import UserError
from sae_lab.text.columns import Column
from sae_lab.text.readers import clean, texts_of

VERSION = "1"  # of the conversion: a cached table of another version is not used
BATCH = 2**24  # characters that are written together


@dataclass
class TextsConfig(datasets.BuilderConfig):
    """The files to convert, their format, and the columns that are the text."""

    files: Sequence[Path] = ()
    format: str = "text"
    columns: Sequence[Column] = ()


class Texts(datasets.ArrowBasedBuilder):
    """A table with a row per document: `text`, and `damaged`, whether it holds U+FFFD in the place of bad bytes."""

    BUILDER_CONFIG_CLASS = TextsConfig

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features({"text": datasets.Value("string"), "damaged": datasets.Value("bool")})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": self.config.files})]

    def _generate_shards(self, files: Sequence[Path]) -> Iterator[str]:
        yield from map(str, files)

    def _generate_tables(self, files: Sequence[Path]) -> Iterator[tuple[Key, pa.Table]]:
        for i, file in enumerate(files):
            for n, texts in enumerate(batches(texts_of(file, self.config.format, self.config.columns))):
                yield Key(i, n), table_of(texts)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield lists of texts, of BATCH characters each or a little more."""
    batch, length = list[str](), 0
    for text in texts:
        batch.append(text)
        length += len(text) + 1
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def table_of(texts: list[str]) -> pa.Table:
    """Return a table of the texts, each of them valid UTF-8."""
    try:
        column, damaged = pa.array(texts, pa.string()), [False] * len(texts)
    except UnicodeEncodeError:
        cleaned = [clean(text) for text in texts]
        damaged = [a != b for a, b in zip(cleaned, texts, strict=True)]
        column = pa.array(cleaned, pa.string())
    return pa.table({"text": column, "damaged": pa.array(damaged, pa.bool_())})


def prepare(files: Sequence[Path], format: str, columns: Sequence[Column]) -> datasets.Dataset:
    """Return the texts of the files; they are converted again if the size or the time of a file has changed.

    Raises:
        UserError: a file cannot be read. The sentence names it.
    """
    known = [VERSION, format, *columns, *((str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    fingerprint = xxhash.xxh3_128(repr(known).encode("utf-8", "surrogateescape")).hexdigest()
    builder = Texts(
        dataset_name="sae_lab_texts", config_id=fingerprint, files=files, format=format, columns=list(columns)
    )
    try:
        builder.download_and_prepare(verification_mode="no_checks")
    except datasets.exceptions.DatasetGenerationError as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise (cause or e) from None if cause else e.__cause__
    return builder.as_dataset(split="train")
