"""Documents -> packed rows of token ids: a stream that can be stopped and continued at any row."""

import dis
import io
import logging
import re
import sysconfig
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_lab.errors import UserError, first_line

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
HUB_TIMEOUT = 5.0  # seconds that the hub has to answer before it counts as unreachable
WINDOW = 2**23  # characters of text that are read at once and mixed
PIECE = 2**16  # characters after which a document is cut, so that a long one is mixed like the others
# Columns that hold the text, best first; several are joined by blank lines.
TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    *(("text",), ("content",), ("document",), ("body",), ("markdown",)),
    *(("instruction", "input", "output"), ("instruction", "output"), ("instruction", "response")),
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")),
    *(("problem", "solution"), ("output",), ("completion",)),
)

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
        column: str | Sequence[str] | None = None,
        seed: int = 0,
        held_out_every: int = 10,
    ):
        super().__init__(seed, split)
        if held_out_every < 2:
            raise UserError(f"data.held_out_every={held_out_every} leaves nothing to train on: give 2 or more.")
        files, builder = self._find([paths] if isinstance(paths, str) else list(paths))
        options = self.WHOLE if builder == "text" else {}
        self.rows = load_rows(builder, data_files=[escape(f) for f in files], split="train", **options)
        self.columns = text_columns(self.rows.features, column)
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
        text = joined(self.rows[self.numbers[i]], self.columns)
        if len(self.rows) > 1:
            return text
        cut = len(text) * 9 // 10
        return text[cut:] if self.split == HELD_OUT else text[:cut]


class HubDocuments(Documents):
    """A data set of the Hugging Face hub (or a local folder in its format), streamed through `datasets` in its order.

    The first `held_out_documents` documents belong to the split `held_out` and are skipped in training. A place in the
    stream is the state of `datasets`, which then skips whole shards, and reads again what came before in one shard.

    Raises:
        UserError: the data set cannot be reached or read, or has no text column.
    """

    def __init__(
        self,
        path: str,
        split: str = TRAIN,
        name: str | None = None,
        hub_split: str = "train",
        column: str | Sequence[str] | None = None,
        seed: int = 0,
        held_out_documents: int = 1000,
    ):
        super().__init__(seed, split)
        rows = load_rows(path, name=name, split=hub_split, streaming=True)
        self.columns = text_columns(rows.features or next(iter(rows), {}), column)
        self.rows = rows.take(held_out_documents) if split == HELD_OUT else rows.skip(held_out_documents)

    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        place = place or {"window": 0, "rows": None}
        self.rows.load_state_dict(place["rows"])
        texts = (joined(row, self.columns) for row in self.rows)
        while window := take_window(texts):
            yield Window(place, window)
            place = {"window": place["window"] + 1, "rows": self.rows.state_dict()}


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
        reason = first_line(cause)
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


def text_columns(columns: Mapping[str, Any], named: str | Sequence[str] | None) -> tuple[str, ...]:
    """The columns that hold the text: those named, else the first usual ones, else the only column of strings.

    `columns` are the features of a data set, or one of its rows.
    """
    strings = [name for name, kind in columns.items() if kind is None or is_text(kind)]
    if named is not None:
        chosen = (named,) if isinstance(named, str) else tuple(named)
        if not chosen or not set(chosen) <= set(strings):
            raise UserError(f"data.column={named} is not a text column of the data: choose among {strings}.")
        return chosen
    usual = [choice for choice in TEXT_COLUMNS if set(choice) <= set(strings)]
    if not usual and len(strings) != 1:
        raise UserError(f"no text column among {list(columns)}: name it with data.column=...")
    return usual[0] if usual else (strings[0],)


def is_text(kind: Any) -> bool:
    """Whether a feature of `datasets`, or a value, is a string."""
    return isinstance(kind, str) or getattr(kind, "dtype", None) in ("string", "large_string")


def joined(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The text of a row: its columns that are not empty, with a blank line between them."""
    return "\n\n".join(row[c] for c in columns if row[c])


class TextRows:
    """Rows of `seq_len` token ids, BOS and then tokens of the documents. No padding.

        doc 1: a b c d e   doc 2: f g h   seq_len 4
        pack=True    [BOS a b c] [BOS d e BOS] [BOS f g h]     the documents joined by BOS; nothing lost
        pack=False   [BOS a b c] [BOS f g h]                   no row crosses documents; what does not fill one is lost

    A document boundary that falls on the start of a row is marked by the row's own BOS; a document without tokens is
    passed over. A tokenizer adds nothing of its own, and what looks like a special token in a document is text. When
    the documents end, the stream starts over in a new order and says so; with `repeat=False` it ends, and the last,
    unfilled row is dropped. `state_dict()` is the place of the next row; a stream given that state continues as if it
    had never stopped.

    Raises:
        UserError: a row too short to hold text, or documents without any, or none that fills a row of its own.
    """

    START: dict[str, Any] = {"epoch": 0, "window": None, "piece": 0, "token": 0}

    def __init__(
        self, documents: Documents, tokenizer: Any, seq_len: int, bos_id: int, repeat: bool = True, pack: bool = True
    ):
        if seq_len < 2:
            raise UserError(f"seq_len={seq_len} leaves no room for text after BOS: give 2 or more.")
        self.documents, self.tokenizer, self.seq_len, self.bos_id = documents, tokenizer, seq_len, bos_id
        self.repeat, self.pack = repeat, pack
        self.load_state_dict(self.START)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "window": self.window, "piece": self.piece, "token": self.token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.window, self.piece, self.token = (state[key] for key in self.START)
        self._pieces: Iterator[Piece] | None = None
        self._ids: list[int] | None = None
        self._useful = state != self.START  # whether this pass has held something for a row so far

    def __iter__(self) -> "TextRows":
        return self

    def __next__(self) -> list[int]:
        row = [self.bos_id]
        while len(row) < self.seq_len:
            ids = self._piece()
            if len(row) == 1 and self.token == 0:
                self.token = 1  # the row's own BOS stands for the document's
            taken = ids[self.token : self.token + self.seq_len - len(row)]
            row += taken
            self.token += len(taken)
            self._useful |= self.pack or len(row) == self.seq_len
            if self.token >= len(ids):
                self.piece, self.token, self._ids = self.piece + 1, 0, None
                if not self.pack and len(row) < self.seq_len:
                    row = [self.bos_id]
        return row

    def _piece(self) -> list[int]:
        """BOS and the ids of the piece at the cursor, opening the next pass where one ends."""
        if self._pieces is None:
            self._pieces = self.documents.pieces(self.epoch, self.window, self.piece)
        while self._ids is None:
            piece = next(self._pieces, None)
            if piece is None:
                self._next_pass()
                continue
            self.window, self.piece = piece.place, piece.n
            ids = self.tokenizer(piece.text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            if ids["input_ids"]:
                self._ids = [self.bos_id, *ids["input_ids"]]
        return self._ids

    def _next_pass(self) -> None:
        if not self._useful:
            if self.pack:
                raise UserError("the data hold no text: check data.paths, or the split that data=... names.")
            raise UserError(f"no document fills a row of seq_len={self.seq_len}: lower it, or give data.pack=true.")
        if not self.repeat:
            raise StopIteration
        log.warning("The text ended: it starts over in a new order (pass %d).", self.epoch + 2)
        self.load_state_dict(self.START | {"epoch": self.epoch + 1})
        self._useful = False
        self._pieces = self.documents.pieces(self.epoch)
