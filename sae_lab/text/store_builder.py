"""Tokenize all documents into a store, on all cores. A build that was killed continues and ends with the same bytes."""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from sae_lab.runtime.files import digest_of_file, digest_of_json, read_json, remove_unfinished, write_json
from sae_lab.runtime.os_errors import naming
from sae_lab.runtime.screen import TokenProgress
from sae_lab.runtime.signals import raise_if_stopped, received_signal
from sae_lab.text.contents import TOKENS
from sae_lab.text.current_part import part_prefix
from sae_lab.text.documents import DocumentPiece, IndexedDocuments, cut_documents, take_batches
from sae_lab.text.encoding import TOGETHER, Encode, Ids
from sae_lab.text.notes import Notes
from sae_lab.text.packing import Packer
from sae_lab.text.store import CHECKSUMS, FILES, PROGRESS, ROWS, STARTS, write_manifest

SAVE_SECONDS = 2.0
"""Time between two saves of the progress: what a kill loses."""


class StoreBuilder:
    """Writes a store into a folder whose lock the caller holds.

    Memory is bounded whatever the size of the text: one document and three batches of TOGETHER characters.

    Raises:
        SafeStop: a signal arrived; the progress is saved.
    """

    def __init__(self, folder: Path, key: dict[str, Any], documents: IndexedDocuments, encode: Encode, packer: Packer):
        self.folder, self.key, self.documents, self.encode, self.packer = folder, key, documents, encode, packer
        self.next = (0, 0)  # document and piece
        self.notes = Notes()

    def build(self) -> None:
        remove_unfinished(self.folder)
        with ExitStack() as stack:
            stack.enter_context(naming(self.folder))
            self.files = self._open_files(stack)
            begun, n_rows = time.perf_counter(), self.packer.n_rows
            self._write_all()
            self._append(STARTS, np.array(self.packer.finish(), "<i8"))
            self._sync()
        self._finish()
        n_tokens = (self.packer.n_rows - n_rows) * self.packer.seq_len
        rate = n_tokens / (time.perf_counter() - begun)
        counts = f"{len(self.documents):,} documents: {n_tokens:,} tokens at {rate:,.0f} tokens/s"
        done = "packed" if self.documents.kinds == TOKENS else "tokenized"
        print(f"{part_prefix()}{done} {counts}, kept in {self.folder}", flush=True)

    def _write_all(self) -> None:
        """Write the rows of all documents from `self.next` on."""
        seq_len, saved = self.packer.seq_len, time.monotonic()
        pieces = cut_documents(self.documents.in_order(self.next[0]), self.encode.cut, *self.next)
        with TokenProgress("tokenizing", 0, self.packer.n_rows * seq_len) as bar:
            for batch, ids in encode_ahead(take_batches(pieces, TOGETHER), self.encode):
                rows, starts = self.packer.add((piece.piece == 0, own) for piece, own in zip(batch, ids, strict=True))
                self._append(ROWS, rows)
                self._append(CHECKSUMS, np.array([xxhash.xxh32_intdigest(row) for row in rows], "<u4"))
                self._append(STARTS, np.array(starts, "<i8"))
                self.notes.add_all(batch)
                self.next = (batch[-1].document, batch[-1].piece + 1)
                n_tokens = self.packer.n_rows * seq_len
                bar.expect(n_tokens * len(self.documents) // (self.next[0] + 1))
                bar.advance(n_tokens - bar.done)
                if time.monotonic() - saved >= SAVE_SECONDS or received_signal() is not None:
                    self._save()
                    saved = time.monotonic()
                    raise_if_stopped()

    def _open_files(self, stack: ExitStack) -> dict[str, BinaryIO]:
        """Open the files where the last save left them, empty if there is none; restore the packer."""
        sizes = dict.fromkeys(FILES, 0)
        if progress := self._read_progress():
            sizes, self.next = progress["sizes"], (progress["document"], progress["piece"])
            self.packer.load_state_dict(progress["packer"])
            self.notes.load_state_dict(progress.get("notes", self.notes.state_dict()))
            print(f"tokenizing on from document {self.next[0]:,} of {len(self.documents):,}", flush=True)
        files: dict[str, BinaryIO] = {name: stack.enter_context((self.folder / name).open("ab")) for name in FILES}
        for name, file in files.items():
            file.truncate(sizes[name])
            file.seek(sizes[name])
        return files

    def _read_progress(self) -> dict[str, Any] | None:
        """Return the saved progress, if the files hold what it says."""
        if not (self.folder / PROGRESS).is_file():
            return None
        progress = read_json(self.folder / PROGRESS)
        paths = {self.folder / name: size for name, size in progress["sizes"].items()}
        whole = all(path.is_file() and path.stat().st_size >= size for path, size in paths.items())
        return progress if whole else None

    def _append(self, name: str, content: np.ndarray) -> None:
        self.files[name].write(content.tobytes())

    def _sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def _save(self) -> None:
        self._sync()
        sizes = {name: file.tell() for name, file in self.files.items()}
        place = {"document": self.next[0], "piece": self.next[1]}
        state = {"packer": self.packer.state_dict(), "notes": self.notes.state_dict()}
        write_json(self.folder / PROGRESS, {**place, **state, "sizes": sizes})

    def _finish(self) -> None:
        packer = self.packer
        shape = {"rows": packer.n_rows, "seq_len": packer.seq_len, "dtype": packer.dtype.str}
        digest = digest_of_json([packer.n_rows, packer.seq_len, digest_of_file(self.folder / ROWS)])
        counts = {"documents": len(self.documents), "tokens": packer.n_tokens, "notes": self.notes.state_dict()}
        digests = {"digest": digest, "starts_digest": digest_of_file(self.folder / STARTS)}
        write_manifest(self.folder, {**shape, **counts, **digests, "key": self.key})
        (self.folder / PROGRESS).unlink(missing_ok=True)


def encode_ahead(
    batches: Iterable[list[DocumentPiece]], encode: Encode
) -> Iterator[tuple[list[DocumentPiece], list[Ids]]]:
    """Yield each batch with its token ids. A thread encodes the next batch while the caller uses this one."""
    with ThreadPoolExecutor(1, "tokenizer") as thread:
        ahead: deque[tuple[list[DocumentPiece], Future[list[Ids]]]] = deque()
        for batch in batches:
            ahead.append((batch, thread.submit(encode, [piece.text for piece in batch])))
            if len(ahead) == 2:
                done, ids = ahead.popleft()
                yield done, ids.result()
        for done, ids in ahead:
            yield done, ids.result()
