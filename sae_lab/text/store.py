"""Rows of token ids on disk: all rows of a text, in the order of the documents, each with a checksum.

| File | Content |
|---|---|
| rows.bin | token ids, uint16 or uint32, (rows, seq_len) |
| checksums.bin | xxh32 of each row, uint32 |
| starts.bin | position of each document's first token in rows.bin, int64 |
| manifest.json | sizes, the digest of the rows, what they were made from |
| progress.json | while it is built: how far the three files are valid, and what comes next |

Numbers are little-endian.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int, Int64
from numpy import ndarray as Array

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_file, digest_of_json, parse_json, read_small, write_json
from sae_lab.text.notes import Notes

ROWS, CHECKSUMS, STARTS = FILES = ("rows.bin", "checksums.bin", "starts.bin")
MANIFEST, PROGRESS = "manifest.json", "progress.json"
FORMAT = 1


class TokenStore:
    """A complete store, open for reading. The files are memory-mapped.

    Attributes:
        n_tokens: tokens of the documents, without BOS; also those that fill no row.
        notes: what the user should know of the documents.
        identity: digest of the rows. Stores of the same text have the same, wherever the text lies.

    Raises:
        UserError: the manifest is damaged, or a file has another size. When a row is read: it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = self._read_manifest()
        self.n_rows, self.seq_len, self.identity = manifest["rows"], manifest["seq_len"], manifest["digest"]
        self._starts_digest = manifest["starts_digest"]
        self.n_documents, self.n_tokens = manifest["documents"], manifest["tokens"]
        self.notes = Notes()
        self.notes.load_state_dict(manifest.get("notes", self.notes.state_dict()))
        self._rows = self._map(ROWS, manifest["dtype"], self.n_rows, self.seq_len)
        self._checksums = self._map(CHECKSUMS, "<u4", self.n_rows)

    def __len__(self) -> int:
        return self.n_rows

    def read(self, numbers: Int64[Array, "r"]) -> Int[Array, "r t"]:
        """Return a copy of the rows with these numbers."""
        rows = self._rows[numbers]
        checksums = np.array([xxhash.xxh32_intdigest(row) for row in rows], np.uint32)
        bad = numbers[checksums != self._checksums[numbers]]
        if len(bad):
            raise self._damaged(f"row {bad[0]} of {ROWS} has another checksum")
        return rows

    @cached_property
    def starts(self) -> Int64[Array, "n"]:
        """Position of each document's first token in all rows; of one without, that of the next one."""
        if digest_of_file(self.folder / STARTS) != self._starts_digest:
            raise self._damaged(f"{STARTS} has another digest")
        return self._map(STARTS, "<i8", self.n_documents)

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = parse_json(read_small(self.folder / MANIFEST))
            recorded = manifest.pop("manifest_digest", None)
        except ValueError as e:
            raise self._damaged(f"{MANIFEST}: {e}") from e
        if recorded != digest_of_json(manifest):
            raise self._damaged(f"{MANIFEST} has another digest")
        return manifest

    def _map(self, name: str, dtype: str, *shape: int) -> Array:
        size, file = np.dtype(dtype).itemsize * int(np.prod(shape)), self.folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise self._damaged(f"{name} is not of {size:,} bytes")
        # An empty file cannot be mapped.
        return np.asarray(np.memmap(file, dtype, "r", shape=shape)) if size else np.empty(shape, dtype)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} is damaged ({what}): delete that folder, and the same command tokenizes the text again."
        )


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, content | {"manifest_digest": digest_of_json(content)})
