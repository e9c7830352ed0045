"""Documents -> packed rows of token ids: a stream that can be stopped and continued at any row."""

import dis
import io
import logging
import re
import sysconfig
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch

from sae_lab.errors import UserError

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
HUB_TIMEOUT = 5.0  # seconds that the hub has to answer before it counts as unreachable
TEXT_COLUMNS = ("text", "content", "document", "body", "markdown", "output", "completion")


class Documents(ABC):
    """Text as a sequence of passes; every pass holds the same documents, each in an order of its own."""

    @abstractmethod
    def stream(self, epoch: int, start: int = 0) -> Iterator[str]:
        """The documents of pass `epoch`, from the `start`-th of that pass on."""


class IndexedDocuments(Documents):
    """Documents that can be read in any order: pass `epoch` is a permutation drawn from (seed, epoch)."""

    def __init__(self, seed: int, split: str = TRAIN):
        # Held-out documents come in one order, whatever the seed: all runs are judged on the same text.
        self.seed = seed if split == TRAIN else 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> str: ...

    def stream(self, epoch: int, start: int = 0) -> Iterator[str]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        for i in torch.randperm(len(self), generator=generator)[start:].tolist():
            yield self[i]


def held_out(name: str, every: int) -> bool:
    """Whether the document of this name is kept from training: one in `every`, by checksum, the same everywhere."""
    return zlib.crc32(name.encode()) % every == 0


class StdlibDocuments(IndexedDocuments):
    """The source text and docstrings of the running Python's standard library, one document a module.

    Left out: tests (some distributions do not ship them) and the character tables of `encodings`.
    One module in `held_out_every` belongs to the split `held_out`, the others to `train`.
    """

    LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3"}

    def __init__(self, split: str = TRAIN, seed: int = 0, held_out_every: int = 10):
        super().__init__(seed, split)
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
        names = [n for n in names if not self.LEFT_OUT & set(n.split("/")[:-1])]
        self.paths = [root / n for n in names if held_out(n, held_out_every) == (split == HELD_OUT)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str:
        return self.paths[i].read_text(encoding="utf-8", errors="replace")


class DisassembledStdlib(StdlibDocuments):
    """The same modules as bytecode listings (`dis`), each cut to the length of its source; `mixed` adds the source.

    Text of another kind that every machine has. A module that does not compile is an empty document.
    """

    def __init__(self, split: str = TRAIN, seed: int = 0, held_out_every: int = 10, mixed: bool = False):
        super().__init__(split, seed, held_out_every)
        self.mixed = mixed

    def __len__(self) -> int:
        return len(self.paths) * (1 + self.mixed)

    def __getitem__(self, i: int) -> str:
        source = super().__getitem__(i % len(self.paths))
        return source if i >= len(self.paths) else disassembled(source)[: len(source)]


def disassembled(source: str) -> str:
    """The listing of a module's bytecode, without addresses in memory; empty where it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(source, "module", "exec")
    except (SyntaxError, ValueError):
        return ""
    listing = io.StringIO()
    dis.dis(code, file=listing)
    return re.sub(r" at 0x[0-9a-f]+", "", listing.getvalue())


class FileDocuments(IndexedDocuments):
    """Text files named by globs, through `datasets`: txt and md (one document a file), jsonl, csv, parquet (one a row).

    `datasets` keeps a copy in its cache and maps that into memory, so the files may be larger than memory. Bytes of
    txt and md that are not UTF-8 become U+FFFD.

    One document in `held_out_every` belongs to the split `held_out`, chosen by its number; of fewer, the last one;
    of a single document, its last tenth.

    Raises:
        UserError: no file matches, files of unknown or mixed kinds, a file that cannot be read, or no text column.
    """

    WHOLE = {"sample_by": "document", "encoding_errors": "replace"}
    BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

    def __init__(
        self,
        paths: Sequence[str] | str,
        split: str = TRAIN,
        column: str | None = None,
        seed: int = 0,
        held_out_every: int = 10,
    ):
        super().__init__(seed, split)
        if held_out_every < 2:
            raise UserError(f"data.held_out_every={held_out_every} leaves nothing to train on: give 2 or more.")
        files, builder = self._find([paths] if isinstance(paths, str) else list(paths))
        options = self.WHOLE if builder == "text" else {}
        self.rows = load_rows(builder, data_files=[escape(f) for f in files], split="train", **options)
        self.column = text_column(self.rows.features, column)
        self.split = split
        n = len(self.rows)
        every = min(held_out_every, n)
        self.numbers = [i for i in range(n) if n == 1 or (i % every == every - 1) == (split == HELD_OUT)]

    @classmethod
    def _find(cls, globs: list[str]) -> tuple[list[str], str]:
        found = {f for g in globs for f in glob(str(Path(g).expanduser()), recursive=True)}  # noqa: PTH207 (no root)
        files = sorted(f for f in found if Path(f).is_file())
        if not files:
            raise UserError(f"no file matches data.paths={globs}: give globs, such as data.paths=['corpus/**/*.txt'].")
        suffixes = sorted({Path(f).suffix.lower() for f in files})
        builders = {cls.BUILDERS.get(suffix) for suffix in suffixes}
        builder = builders.pop()
        if builders or builder is None:
            raise UserError(
                f"data.paths match files of kinds {suffixes}: give files of one kind of {list(cls.BUILDERS)}."
            )
        return files, builder

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> str:
        text = self.rows[self.numbers[i]][self.column] or ""
        if len(self.rows) > 1:
            return text
        cut = len(text) * 9 // 10
        return text[cut:] if self.split == HELD_OUT else text[:cut]


class HubDocuments(Documents):
    """A data set of the Hugging Face hub (or a local folder in its format), streamed through `datasets`.

    The first `held_out_documents` documents belong to the split `held_out` and are skipped in training. The first
    pass keeps the data set's order; a later pass is shuffled through a window of `window` documents. To start from the
    n-th document of a pass, the n before it are read and dropped.

    Raises:
        UserError: the data set cannot be reached or read, or has no text column.
    """

    def __init__(
        self,
        path: str,
        split: str = TRAIN,
        name: str | None = None,
        hub_split: str = "train",
        column: str | None = None,
        seed: int = 0,
        held_out_documents: int = 1000,
        window: int = 10_000,
    ):
        self.seed, self.window = seed, window
        rows = load_rows(path, name=name, split=hub_split, streaming=True)
        self.column = text_column(rows.features or next(iter(rows), {}), column)
        self.rows = rows.take(held_out_documents) if split == HELD_OUT else rows.skip(held_out_documents)

    def stream(self, epoch: int, start: int = 0) -> Iterator[str]:
        rows = self.rows
        if epoch > 0:
            rows = rows.shuffle(seed=self.seed * 1_000_003 + epoch, buffer_size=self.window)
        for row in rows.skip(start):
            yield row[self.column] or ""


def load_rows(path: str, **options: Any):
    """`datasets.load_dataset`, whose failures (no network, no such data set, a broken file) become one sentence.

    A hub name is first asked for once: `datasets` itself would retry for 23 seconds. With HF_HUB_OFFLINE=1 nothing is
    asked, and what is in the cache of `datasets` is used.
    """
    import datasets
    from huggingface_hub import HfApi

    on_hub = "data_files" not in options and not path.startswith(("/", ".", "~")) and not Path(path).exists()
    try:
        with quiet():
            if on_hub and not datasets.config.HF_HUB_OFFLINE:
                HfApi().dataset_info(path, timeout=HUB_TIMEOUT)
            return datasets.load_dataset(path, **options)
    except Exception as e:  # datasets raises a dozen kinds, from many libraries; all of them mean the same to a user
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if "data_files" in options:
            raise UserError(f"the files of data.paths cannot be read as {path}: {reason}") from e
        raise UserError(
            f"the data set {path!r} cannot be loaded ({reason}): check its name and the network, "
            "or train on local text with data=stdlib or data=text_files data.paths=[...]."
        ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of `datasets` inside, as before outside."""
    import datasets

    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def text_column(columns: Any, named: str | None) -> str:
    """The column that holds the text: the named one, else the first usual name, else the only column."""
    names = list(columns)
    if named is not None:
        if named not in names:
            raise UserError(f"data.column={named} is not a column of the data: choose one of {names}.")
        return named
    usual = [c for c in TEXT_COLUMNS if c in names]
    if not usual and len(names) != 1:
        raise UserError(f"no text column among {names}: name it with data.column=...")
    return (usual or names)[0]


class TextRows:
    """Rows of `seq_len` token ids: BOS, then the next tokens of the documents joined by BOS. No padding, nothing lost.

        doc 1: a b c d e   doc 2: f g h   seq_len 4   ->   [BOS a b c] [BOS d e BOS] [BOS f g h]

    A document boundary that falls on the start of a row is marked by the row's own BOS; a document without tokens is
    passed over. When the documents end, the stream starts over in a new order and says so; with `repeat=False` it ends,
    and the last, unfilled row is dropped. `state_dict()` is the place of the next row; a stream given that state
    continues as if it had never stopped.

    Raises:
        UserError: a row too short to hold text, or documents without any.
    """

    def __init__(self, documents: Documents, tokenizer: Any, seq_len: int, bos_id: int, repeat: bool = True):
        if seq_len < 2:
            raise UserError(f"seq_len={seq_len} leaves no room for text after BOS: give 2 or more.")
        self.documents, self.tokenizer, self.seq_len, self.bos_id = documents, tokenizer, seq_len, bos_id
        self.repeat = repeat
        self.load_state_dict({"epoch": 0, "document": 0, "token": 0})

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "document": self.document, "token": self.token}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.document, self.token = state["epoch"], state["document"], state["token"]
        self._texts: Iterator[str] | None = None
        self._ids: list[int] | None = None
        self._any_text = self.document > 0  # whether this pass has held a token so far

    def __iter__(self) -> "TextRows":
        return self

    def __next__(self) -> list[int]:
        row = [self.bos_id]
        while len(row) < self.seq_len:
            ids = self._document()
            if len(row) == 1 and self.token == 0:
                self.token = 1  # the row's own BOS stands for the document's
            taken = ids[self.token : self.token + self.seq_len - len(row)]
            row += taken
            self.token += len(taken)
            if self.token >= len(ids):
                self.document, self.token, self._ids = self.document + 1, 0, None
        return row

    def _document(self) -> list[int]:
        """BOS and the ids of the document at the cursor, opening the next pass where one ends."""
        if self._texts is None:
            self._texts = self.documents.stream(self.epoch, self.document)
        while self._ids is None:
            text = next(self._texts, None)
            if text is None:
                self._next_pass()
                continue
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if ids:
                self._ids, self._any_text = [self.bos_id, *ids], True
            else:
                self.document += 1
        return self._ids

    def _next_pass(self) -> None:
        if not self._any_text:
            raise UserError("the data hold no text: check data.paths, or the split that data=... names.")
        if not self.repeat:
            raise StopIteration
        log.warning(
            "The text ended after %d documents: it starts over in a new order (pass %d).", self.document, self.epoch + 2
        )
        self.epoch, self.document, self.token, self._any_text = self.epoch + 1, 0, 0, False
        self._texts = self.documents.stream(self.epoch)
