"""Read files as rows, one reader per format, and rows as texts. A row is a dict, as the columns of a data set name it.

Bytes that are not UTF-8 are kept as lone surrogates (PEP 383) until `clean` turns them into U+FFFD.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sae_lab.runtime.errors import UserError, first_line
from sae_lab.text.archives import opened, plain_utf8
from sae_lab.text.columns import CHATS_OR_TOKENS, SAMPLE, features_of
from sae_lab.text.contents import Content, Document
from sae_lab.text.formats import format_of, is_archive, may_be_data

Row = Mapping[str, Any]
Names = Sequence[str] | None  # the top-level columns that are wanted; None: all
CSV_CHUNK = 10_000  # rows
LOOKED_AT = 1_000  # rows from which the types of columns are inferred


def rows_of(file: Path, format: str, names: Names = None) -> Iterator[Row]:
    """Yield the rows of a file, or of all files in an archive.

    Raises:
        UserError: the file cannot be read. The sentence names it and the row.
    """
    n = 0
    try:
        with opened(file) as streams:
            if is_archive(file.name):  # READMEs and the like are passed over
                streams = ((m, s) for m, s in streams if may_be_data(m) and format in (format_of(m), "webdataset"))
            for row in parts_of_rows(streams) if format == "webdataset" else read_all(streams, format, names):
                n += 1
                yield row
    except Exception as e:
        if isinstance(e, UserError) and str(e).startswith(str(file)):
            raise
        raise UserError(
            f"{file} cannot be read as {format} after row {n:,} ({first_line(e)}): mend it or download it again, or "
            "leave it out of data.paths."
        ) from e


def read_all(streams: Iterator[tuple[str, IO[bytes]]], format: str, names: Names) -> Iterator[Row]:
    for _, stream in streams:
        yield from READERS[format](stream, names)


def read_text(stream: IO[bytes], names: Names) -> Iterator[Row]:
    """Yield the whole file as one row. Line ends become line feeds."""
    yield {"text": TextIOWrapper(plain_utf8(stream), "utf-8", errors="surrogateescape").read()}


def read_lines(stream: IO[bytes], names: Names) -> Iterator[Row]:
    """Yield each line that is not blank as a row."""
    for line in TextIOWrapper(plain_utf8(stream), "utf-8", errors="surrogateescape"):
        if line.strip():
            yield {"text": line.rstrip("\n")}


def read_json_lines(stream: IO[bytes], names: Names) -> Iterator[Row]:
    for number, line in enumerate(plain_utf8(stream), 1):
        if line.strip():
            yield json_row(loads(line, f"line {number:,}: "))


def read_json(stream: IO[bytes], names: Names) -> Iterator[Row]:
    """Yield the rows of a JSON document (an array, or an object with one list of rows), or of JSON lines."""
    lines = plain_utf8(stream)
    first = next((line for line in lines if line.strip()), b"")
    try:
        whole = loads(first) if first else []
        second = next((line for line in lines if line.strip()), b"")
    except UserError:
        whole, second = loads(first + lines.read()), b""
    if not second:
        yield from map(json_row, rows_in(whole))
        return
    yield json_row(whole)
    yield json_row(loads(second, "line 2: "))
    for number, line in enumerate(lines, 3):
        if line.strip():
            yield json_row(loads(line, f"line {number:,}: "))


def loads(encoded: bytes, where: str = "") -> Any:
    try:
        return json.loads(encoded.decode("utf-8", "surrogateescape"))
    except ValueError as e:
        raise UserError(f"{where}{first_line(e)}") from e


def json_row(value: Any) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise UserError(f"a row is {str(value)[:30]!r}, neither an object nor a string")


def rows_in(document: Any) -> list[Any]:
    """Return the rows of a JSON document: an array, an object's one list of objects, its columns, or itself."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise UserError("it is neither an array nor an object")
    lists = [name for name, v in document.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    lists = [name for name in lists if name not in CHATS_OR_TOKENS]
    if len(lists) > 1:
        raise UserError(f"it holds several lists of rows, {lists}: write the one that is the text to a file of its own")
    if lists:
        return document[lists[0]]
    values = [v.values() if isinstance(v, dict) else v for v in document.values()]
    lengths = {len(v) if isinstance(v, dict | list) else None for v in document.values()}
    if None not in lengths and len(lengths) == 1 and set(document) - CHATS_OR_TOKENS:
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return [document]


def read_csv(stream: IO[bytes], names: Names, separator: str = ",") -> Iterator[Row]:
    """Yield the rows. pandas sees each byte as a character (Latin-1), since its strings cannot hold other bytes."""
    import pandas as pd

    chunks = pd.read_csv(
        plain_utf8(stream),
        sep=separator,
        chunksize=CSV_CHUNK,
        encoding="latin-1",
        usecols=None if names is None else lambda name: as_utf8(name) in names,
        dtype=None if names is None else str,
    )
    for chunk in chunks:
        for row in chunk.astype(object).where(chunk.notna(), None).to_dict("records"):
            yield {as_utf8(name): as_utf8(value) for name, value in row.items()}


def as_utf8(value: Any) -> Any:
    """Return a string whose characters are bytes as the UTF-8 that it is; other values unchanged."""
    return value.encode("latin-1").decode("utf-8", "surrogateescape") if isinstance(value, str) else value


def read_tsv(stream: IO[bytes], names: Names) -> Iterator[Row]:
    return read_csv(stream, names, "\t")


def read_parquet(stream: IO[bytes], names: Names) -> Iterator[Row]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream)
    columns = [name for name in table.schema_arrow.names if names is None or name in names]
    for batch in table.iter_batches(1024, columns=columns):
        yield from plain_rows(batch)


def read_arrow(stream: IO[bytes], names: Names) -> Iterator[Row]:
    reader = arrow_reader(stream)
    n = getattr(reader, "num_record_batches", None)
    for batch in reader if n is None else map(reader.get_batch, range(n)):
        yield from plain_rows(batch.select([n for n in batch.schema.names if names is None or n in names]))


def arrow_reader(stream: IO[bytes]) -> Any:
    """Return the reader of an Arrow stream or an Arrow file."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_file(stream)


READERS: dict[str, Callable[[IO[bytes], Names], Iterator[Row]]] = {
    "text": read_text,
    "lines": read_lines,
    "json": read_json,
    "jsonl": read_json_lines,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def parts_of_rows(streams: Iterator[tuple[str, IO[bytes]]]) -> Iterator[Row]:
    """Yield rows of the WebDataset format: files of an archive with the same name but for the suffix."""
    key, row = "", dict[str, Any]()
    for name, stream in streams:
        stem, _, suffix = name.rpartition(".")
        if stem != key and row:
            yield row
            row = {}
        key = stem
        if suffix in ("txt", "text", "md", "json"):
            (part,) = read_text(stream, None)
            row[suffix] = json.loads(part["text"]) if suffix == "json" else part["text"]
    if row:
        yield row


def plain_rows(table: Any) -> list[Row]:
    """Return the rows of an Arrow table or batch. Strings may hold bytes that are not UTF-8, which Arrow refuses."""
    import pyarrow as pa

    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        fields = [pa.field(field.name, as_bytes(field.type)) for field in table.schema]
        whole = pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
        return undecoded(whole.cast(pa.schema(fields)).to_pylist())


def as_bytes(kind: Any) -> Any:
    """Return an Arrow type with bytes in the place of strings."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, as_bytes(f.type)) for f in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(as_bytes(kind.value_type))
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)


def undecoded(value: Any) -> Any:
    """Return a value with strings in the place of bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {name: undecoded(part) for name, part in value.items()}
    return [undecoded(part) for part in value] if isinstance(value, list) else value


def clean(text: str) -> str:
    """Return the text with U+FFFD for bytes that are not UTF-8 and for halves of UTF-16 pairs.

    As many as `bytes.decode("utf-8", "replace")` gives.
    """
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def documents_of(file: Path, format: str, content: Content) -> Iterator[Document]:
    """Yield the document of each row of a file; strings may hold lone surrogates.

    Raises:
        UserError: the file cannot be read, or has none of the columns, or a value is no text.
    """
    names = content.names
    n, found = 0, False
    for n, row in enumerate(rows_of(file, format, names), 1):
        found = found or any(name in row for name in names)
        yield content.read(row, f"row {n:,} of {file}")
    if n and not found:
        raise UserError(
            f"{file} has no column {' or '.join(names)}: leave it out of data.paths, or give another data.column."
        )


def sample_of(files: Sequence[Path], format: str) -> tuple[Mapping[str, Any], list[Row]]:
    """Return the features of the files and the first rows: from the first file that has rows.

    Plain text has one column, `text`, and no rows to look at: its documents are whole files and may be large.
    """
    if format in ("text", "lines"):
        return features_of([{"text": ""}]), []
    declared = format in ("parquet", "arrow")
    rows: list[Row] = []
    for file in files:
        if rows := list(islice(rows_of(file, format), SAMPLE if declared else LOOKED_AT)):
            break
    features = schema_features(file, format) if declared else features_of(undamaged(rows))
    return features, undamaged(rows[:SAMPLE])


def schema_features(file: Path, format: str) -> Mapping[str, Any]:
    """Return the features of a parquet or arrow file that can be read; of an archive, those of its first file."""
    import datasets
    import pyarrow.parquet as pq

    with opened(file) as streams:
        stream = next(s for name, s in streams if not is_archive(file.name) or format_of(name) == format)
        schema = pq.read_schema(stream) if format == "parquet" else arrow_reader(stream).schema
        return datasets.Features.from_arrow_schema(schema)


def undamaged(value: Any) -> Any:
    """Return a value whose strings are valid UTF-8."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {name: undamaged(part) for name, part in value.items()}
    return [undamaged(part) for part in value] if isinstance(value, list) else value
