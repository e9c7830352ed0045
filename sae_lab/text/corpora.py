"""Documents from local files and from the Hugging Face hub, read with `datasets`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, first_line
from sae_lab.runtime.hub import HUB_TIMEOUT, hub_errors
from sae_lab.text.columns import SAMPLE, Column, choose_columns, escaped, excerpt, features_of, text_of
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents, IndexedDocuments, Place, Window, digest_of, take_window
from sae_lab.text.saved import is_saved, load_saved, with_split

Globs = Annotated[Sequence[str] | str, ErrorMessage("must be a list of globs, such as ['corpus/**/*.txt']")]


def description(columns: Sequence[Column], n_documents: str, first: str) -> str:
    """Return the line that tells the user which text is read."""
    names = " + ".join(column.path for column in columns)
    return f"text: column {names} of {n_documents} documents; the first begins {excerpt(first, 80)!r}"


class FileDocuments(IndexedDocuments):
    """Local files that match globs: txt and md (one document per file); json, jsonl, csv, parquet, arrow (one per row).

    `datasets` copies the files to its cache and memory-maps the copy, so they may be larger than memory. Bytes of txt
    and md that are not UTF-8 become U+FFFD. A folder written by `save_to_disk` is memory-mapped where it is.

    Every `held_out_every`-th document belongs to the split `held_out`. If there are fewer documents, the last one is
    held out; if there is only one, its last tenth is.

    Raises:
        UserError: no file matches, the files are of an unknown type or of several types, a file cannot be read, or
            no column is plainly the text.
    """

    WHOLE = {"sample_by": "document", "encoding_errors": "replace"}
    BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv"} | {
        ".parquet": "parquet",
        ".arrow": "arrow",
    }

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
        self.files, self.rows = self._load([paths] if isinstance(paths, str) else [*paths])
        self.columns = choose_columns(self.rows.features, column, self._sample())
        self.split = split
        n = len(self.rows)
        every = min(held_out_every, n)
        self.numbers = [i for i in range(n) if n == 1 or (i % every == every - 1) == (split == HELD_OUT)]

    def _load(self, globs: list[str]) -> tuple[list[Path], Any]:
        """Return the files that the globs match, and their rows."""
        found = sorted({f for g in globs for f in glob(str(Path(g).expanduser()), recursive=True)})  # noqa: PTH207 (no root)
        folders = [f for f in map(Path, found) if is_saved(f)]
        files = [f for f in map(Path, found) if f.is_file() and not set(folders) & set(f.parents)]
        if folders and not files:
            saved = [with_split(f) for f in folders if not set(folders) & set(f.parents)]
            return sorted(f for folder in saved for f in folder.glob("*.arrow")), load_saved(saved)
        builder = self._builder(globs, [*folders, *files])
        options = self.WHOLE if builder == "text" else {}
        return files, load_rows(builder, data_files=[escape(str(f)) for f in files], split="train", **options)

    @classmethod
    def _builder(cls, globs: list[str], files: list[Path]) -> str:
        if not files:
            raise SettingError(f"no file matches {{paths}}={globs}: give globs, such as ['corpus/**/*.txt'].")
        suffixes = sorted({f.suffix.lower() if f.is_file() else "a folder of save_to_disk" for f in files})
        builders = {cls.BUILDERS.get(suffix) for suffix in suffixes}
        builder = builders.pop()
        if builders or builder is None:
            raise SettingError(
                f"{{paths}}={globs} match files of types {suffixes}: all files must be of one type, "
                f"which must be one of {list(cls.BUILDERS)}."
            )
        return builder

    def _sample(self) -> list[dict[str, Any]]:
        """Return the first rows, undecoded; none of txt and md, whose documents are whole files and may be large."""
        n = 0 if self.files and self.BUILDERS[self.files[0].suffix.lower()] == "text" else min(SAMPLE, len(self.rows))
        return self.rows.with_format("arrow")[:n].to_pylist()

    def describe(self) -> str:
        first = text_of(self.rows[0], self.columns) if len(self.rows) else ""
        return description(self.columns, f"{len(self.rows):,}", first)

    def digest(self, thorough: bool = True) -> str:
        return digest_of(self.files, thorough)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> str:
        text = text_of(self.rows[self.numbers[i]], self.columns)
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
        UserError: the data set or its revision cannot be reached or read, or no column is plainly the text.
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
        if is_saved(Path(path).expanduser()):
            path = escaped(path)
            raise SettingError(
                f"{{path}}={path} was written by save_to_disk: type data=text_files data.paths=[{path}]."
            )
        self.commit = commit_on_hub(path, revision)
        rows = load_rows(path, name=name, split=hub_split, streaming=True, revision=self.commit or revision)
        sample = first_rows(rows, SAMPLE, path) if column is None or rows.features is None else []
        self.columns = choose_columns(rows.features or features_of(sample), column, sample)
        self.n_documents = getattr((rows.info.splits or {}).get(hub_split), "num_examples", None)
        self.path, self.whole = path, rows
        self.rows = rows.take(held_out_documents) if split == HELD_OUT else rows.skip(held_out_documents)

    def digest(self, thorough: bool = True) -> str:
        return self.commit or ""

    def describe(self) -> str:
        first = first_rows(self.whole, 1, self.path)
        n_documents = f"{self.n_documents:,}" if self.n_documents else "an unknown number of"
        return description(self.columns, n_documents, text_of(first[0], self.columns) if first else "")

    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        place = place or {"window": 0, "rows": None}
        self.rows.load_state_dict(place["rows"])
        texts = (text_of(row, self.columns) for row in self.rows)
        while window := take_window(texts):
            yield Window(place, window)
            place = {"window": place["window"] + 1, "rows": self.rows.state_dict()}


def load_rows(path: str, **options: Any):
    """Call `datasets.load_dataset`; raise a UserError if there is no such data set or a file is broken."""
    import datasets

    sentence = f"the files of data.paths cannot be read as {path}: {{reason}}"
    with hub_errors(sentence if "data_files" in options else unreachable_sentence(path), root_cause), quiet():
        return datasets.load_dataset(path, **options)


def first_rows(rows: Any, n: int, path: str) -> list[dict[str, Any]]:
    """Return the first n rows of a stream, or as many as there are; raise a UserError if they cannot be read."""
    with hub_errors(unreachable_sentence(path), root_cause), quiet():
        return list(islice(rows, n))


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
