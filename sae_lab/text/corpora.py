"""Documents from local files and from the Hugging Face hub, read with `datasets`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, first_line
from sae_lab.runtime.hub import HUB_TIMEOUT, hub_errors
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents, IndexedDocuments, Place, Window, digest_of, take_window

log = logging.getLogger(__name__)

# Usual names of the text columns, in order of preference. Several columns are joined by blank lines.
TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    *(("text",), ("content",), ("document",), ("body",), ("markdown",)),
    *(("instruction", "input", "output"), ("instruction", "output"), ("instruction", "response")),
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")),
    *(("problem", "solution"), ("output",), ("completion",)),
)


Globs = Annotated[Sequence[str] | str, ErrorMessage("must be a list of globs, such as ['corpus/**/*.txt']")]


class FileDocuments(IndexedDocuments):
    """Local files that match globs: txt and md (one document per file); json, jsonl, csv and parquet (one per row).

    `datasets` copies the files to its cache and memory-maps the copy, so they may be larger than memory. Bytes of txt
    and md that are not UTF-8 become U+FFFD.

    Every `held_out_every`-th document belongs to the split `held_out`. If there are fewer documents, the last one is
    held out; if there is only one, its last tenth is.

    Raises:
        UserError: no file matches, the files are of an unknown type or of several types, a file cannot be read, or
            there is no text column.
    """

    WHOLE = {"sample_by": "document", "encoding_errors": "replace"}
    BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

    @check_arguments
    def __init__(
        self,
        paths: Globs,
        split: str = TRAIN,
        column: str | Sequence[str] | None = None,
        seed: Annotated[int, Ge(0)] = 0,
        held_out_every: Annotated[int, Ge(2)] = 10,
    ):
        super().__init__(seed, split)
        files, builder = self._find([paths] if isinstance(paths, str) else [*paths])
        options = self.WHOLE if builder == "text" else {}
        self.files = [Path(f) for f in files]
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
            raise SettingError(f"no file matches {{paths}}={globs}: give globs, such as ['corpus/**/*.txt'].")
        suffixes = sorted({Path(f).suffix.lower() for f in files})
        builders = {cls.BUILDERS.get(suffix) for suffix in suffixes}
        builder = builders.pop()
        if builders or builder is None:
            raise SettingError(
                f"{{paths}}={globs} match files of types {suffixes}: all files must be of one type, "
                f"which must be one of {list(cls.BUILDERS)}."
            )
        return files, builder

    def digest(self, thorough: bool = True) -> str:
        return digest_of(self.files, thorough)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> str:
        text = join_columns(self.rows[self.numbers[i]], self.columns)
        if len(self.rows) > 1:
            return text
        cut = len(text) * 9 // 10
        return text[cut:] if self.split == HELD_OUT else text[:cut]


class HubDocuments(Documents):
    """A data set of the Hugging Face hub, or a local folder in the hub's format, streamed in its own order.

    The first `held_out_documents` documents belong to the split `held_out`; training skips them. To resume, `datasets`
    skips the shards that were read completely and rereads the beginning of the current one.

    `revision` (a branch, a tag or a commit) pins the text. The digest of the text is the commit on the hub.

    Raises:
        UserError: the data set or its revision cannot be reached or read, or it has no text column.
    """

    @check_arguments
    def __init__(
        self,
        path: str,
        split: str = TRAIN,
        name: str | None = None,
        hub_split: str = "train",
        column: str | Sequence[str] | None = None,
        seed: Annotated[int, Ge(0)] = 0,
        held_out_documents: Annotated[int, Ge(1)] = 1000,
        revision: str | None = None,
    ):
        super().__init__(seed, split)
        self.commit = commit_on_hub(path, revision)
        rows = load_rows(path, name=name, split=hub_split, streaming=True, revision=self.commit or revision)
        self.columns = text_columns(rows.features or next(iter(rows), {}), column)
        self.rows = rows.take(held_out_documents) if split == HELD_OUT else rows.skip(held_out_documents)

    def digest(self, thorough: bool = True) -> str:
        return self.commit or ""

    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        place = place or {"window": 0, "rows": None}
        self.rows.load_state_dict(place["rows"])
        texts = (join_columns(row, self.columns) for row in self.rows)
        while window := take_window(texts):
            yield Window(place, window)
            place = {"window": place["window"] + 1, "rows": self.rows.state_dict()}


def load_rows(path: str, **options: Any):
    """Call `datasets.load_dataset`; raise a UserError if there is no such data set or a file is broken."""
    import datasets

    sentence = f"the files of data.paths cannot be read as {path}: {{reason}}"
    with hub_errors(sentence if "data_files" in options else unreachable_sentence(path), root_cause), quiet():
        return datasets.load_dataset(path, **options)


def commit_on_hub(path: str, revision: str | None) -> str | None:
    """Return the commit that `revision` currently points to; None for a local folder or with HF_HUB_OFFLINE=1.

    Fails at once without a network, where `datasets` retries for 23 seconds.
    """
    import datasets
    from huggingface_hub import HfApi

    if datasets.config.HF_HUB_OFFLINE or path.startswith(("/", ".", "~")) or Path(path).exists():
        return None
    with hub_errors(unreachable_sentence(path if revision is None else f"{path} at {revision}"), root_cause):
        return HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT).sha


def unreachable_sentence(path: str) -> str:
    """Return the error message for a data set that cannot be loaded, with a placeholder for the reason."""
    return (
        f"the data set {path!r} cannot be loaded ({{reason}}): check data.path, data.name, data.hub_split and the "
        "network, or train on local text with data=stdlib or data=text_files data.paths=[...]."
    )


def root_cause(error: BaseException) -> str:
    """Return the message of the first error in a chain of causes, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of `datasets` inside the context, and restore them afterwards."""
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
    """Return the names of the columns that hold the text.

    Args:
        columns: the features of a data set, or one of its rows.
        named: the user's choice; None takes the first match in TEXT_COLUMNS, else the only column of strings.
    """
    strings = [name for name, kind in columns.items() if kind is None or is_text(kind)]
    if named is not None:
        chosen = (named,) if isinstance(named, str) else tuple(named)
        if not chosen or not set(chosen) <= set(strings):
            raise SettingError(f"{{column}}={named} is not a text column of the data: it must be among {strings}.")
        return chosen
    usual = [choice for choice in TEXT_COLUMNS if set(choice) <= set(strings)]
    if not usual and len(strings) != 1:
        raise SettingError(f"no text column among {list(columns)}: name it with {{column}}=...")
    return usual[0] if usual else (strings[0],)


def is_text(kind: Any) -> bool:
    """Whether a feature of `datasets`, or a value, is of type string."""
    return isinstance(kind, str) or getattr(kind, "dtype", None) in ("string", "large_string")


def join_columns(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return the text of a row: its non-empty text columns, joined by blank lines."""
    return "\n\n".join(row[c] for c in columns if row[c])
