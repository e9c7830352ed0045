"""Documents from local files and folders."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge

from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.hub import hub_errors
from sae_lab.text.choice import ChatSetting, choose_content, described
from sae_lab.text.columns import SAMPLE, Column
from sae_lab.text.contents import Chat, Content, Document, Tokens, beginning, cleaned
from sae_lab.text.documents import HELD_OUT, TRAIN, IndexedDocuments, digest_of, stamp_of
from sae_lab.text.files import Found, find_files
from sae_lab.text.readers import clean, plain_rows, sample_of
from sae_lab.text.saved import joined, load_saved, saved_folders
from sae_lab.text.shards import quiet

Format = Literal["auto", "text", "lines", "json", "jsonl", "csv", "tsv", "parquet", "arrow"]
Globs = Annotated[Sequence[str] | str, ErrorMessage("must be a list of globs, such as ['corpus/**/*.txt']")]


class FileDocuments(IndexedDocuments):
    """Local files or folders: a document per file of plain text, or per row of json, jsonl, csv, tsv, parquet, arrow.

    The files may be compressed or in archives (formats.py). The texts are copied to the cache of `datasets` and
    memory-mapped, so they may be larger than memory. Bytes that are not UTF-8 become U+FFFD. Only the columns of the
    text are read: files may differ in others. A folder written by `save_to_disk` is memory-mapped where it is.

    Every `held_out_every`-th document belongs to the split `held_out`. If there are fewer documents, the last one is
    held out; if there is only one, its last tenth is.

    Args:
        format: the format of all files, whatever their names; `auto` goes by the names. `text` is a document per file,
            `lines` a document per line.
        chat: whether rows are read as chats; see choose_content.

    Raises:
        UserError: no file matches, the files are of an unknown type or of several types, a file cannot be read, or
            no column is plainly the text.
    """

    @check_arguments
    def __init__(
        self,
        paths: Globs,
        split: str = TRAIN,
        column: str | Sequence[str] | None = None,
        seed: Annotated[int, Ge(0)] = 0,
        held_out_every: Annotated[int, Ge(2)] = 10,
        format: Format = "auto",
        chat: ChatSetting = "auto",
    ):
        super().__init__(seed, split)
        globs = [paths] if isinstance(paths, str) else [*paths]
        self.split, self.note, self.is_saved = split, "", False
        if folders := saved_folders(globs):
            self.is_saved, self.files = True, sorted(f for folder in folders for f in folder.glob("*.arrow"))
            parts = load_saved(folders)
            sample = plain_rows(parts[0].with_format("arrow")[:SAMPLE])
            self.content = choose_content(parts[0].features, column, sample, chat)
            self.rows = joined(parts, self.columns).with_format("arrow")
        else:
            found = find_files(globs, None if format == "auto" else format)
            self.files, self.note = found.files, found.note
            features, sample = sample_of(found.files, found.format)
            self.content = choose_content(features, column, sample, chat)
            self.rows = prepared(found, self.content).with_format("arrow")
        self.kinds = frozenset({self.content.kind})
        n = len(self.rows)
        every = min(held_out_every, n)
        self.numbers = [i for i in range(n) if n == 1 or (i % every == every - 1) == (split == HELD_OUT)]

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.content.columns

    def describe(self) -> str:
        first = beginning(self._documents([0])[0]) if len(self.rows) else ""
        line = described(self.content, f"{len(self.rows):,}", first)
        if damaged := self._damaged():
            line += f"; {damaged:,} of them have bytes that are not UTF-8, which become U+FFFD"
        return line + (f"; read: {self.note}" if self.note else "")

    def digest(self, thorough: bool = True) -> str:
        return digest_of(self.files, thorough)

    def fingerprint(self) -> str:
        return stamp_of(self.files)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Document:
        return self.batch([i])[0]

    def batch(self, numbers: Sequence[int]) -> list[Document]:
        """Return the documents of these numbers, as `[self[i] for i in numbers]`, but faster."""
        documents = self._documents([self.numbers[i] for i in numbers])
        return documents if len(self.rows) > 1 else [part_of(one, self.split) for one in documents]

    def _documents(self, rows: list[int]) -> list[Document]:
        table = self.rows[rows]
        if not self.is_saved:
            return from_table(table, self.content)
        numbered = zip(plain_rows(table), rows, strict=True)
        return [cleaned(self.content.read(row, f"row {n + 1:,} of data.paths"), clean) for row, n in numbered]

    def _damaged(self) -> int:
        """Return the number of documents in which bytes were replaced; 0 for saved folders, read in part."""
        return 0 if self.is_saved else sum(sum(b["damaged"].to_pylist()) for b in self.rows.data.to_batches())


def part_of(document: Document, split: str) -> Document:
    """Return the part of the only document that belongs to a split: its first nine tenths, or the last tenth."""
    if isinstance(document, Chat):
        raise UserError("the data are a single chat, of which nothing can be held out: give more.")
    part = slice(len(document) * 9 // 10, None) if split == HELD_OUT else slice(len(document) * 9 // 10)
    return Tokens(document.ids[part], document.where) if isinstance(document, Tokens) else document[part]


def from_table(table: Any, content: Content) -> list[Document]:
    from sae_lab.text import prepare  # which imports `datasets`

    return prepare.from_table(table, content)


def prepared(found: Found, content: Content) -> Any:
    """Return the documents of the files as a table of `datasets`; raise a UserError if a file cannot be read."""
    from sae_lab.text.prepare import prepare  # which imports `datasets`

    with hub_errors("the files of data.paths cannot be converted in the cache of datasets: {reason}"), quiet():
        return prepare(found.files, found.format, content)
