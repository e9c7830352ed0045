"""The shards of a data set that `datasets` streams: opened once, read in the wanted columns, named when they fail."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from sae_lab.runtime.errors import first_line
from sae_lab.runtime.hub import HUB_TIMEOUT, hub_errors
from sae_lab.text.columns import Column


class Shards:
    """The split of a data set of the hub, or of a local folder in the hub's format.

    Raises:
        UserError: there is no such data set, or it cannot be reached.
    """

    def __init__(self, path: str, split: str, **options: Any):
        import datasets

        self.path, self.split = path, split
        with hub_errors(unreachable_sentence(path), root_cause), quiet():
            self.builder = datasets.load_dataset_builder(path, **options)
            self.features = self.rows().features
        self.n_documents = getattr((self.builder.info.splits or {}).get(split), "num_examples", None)

    def rows(self) -> Any:
        """Return a new stream of the rows."""
        return self.builder.as_streaming_dataset(split=self.split)

    def first(self, n: int) -> list[Mapping[str, Any]]:
        """Return the first n rows, or as many as there are; raise a UserError if they cannot be read."""
        with hub_errors(unreachable_sentence(self.path), root_cause), quiet():
            return list(islice(self.rows(), n))

    def sample(self, n: int) -> list[Mapping[str, Any]]:
        """Return the first n rows in all their columns; fewer if a later shard has other columns than the first."""
        rows: list[Mapping[str, Any]] = []
        with hub_errors(unreachable_sentence(self.path), root_cause), quiet():
            try:
                rows.extend(islice(self.rows(), n))
            except ValueError:  # CastError of `datasets`; a row that cannot be read in the wanted columns fails later
                if not rows:
                    raise
        return rows

    def narrow(self, columns: Sequence[Column]) -> None:
        """Read only these columns, so that shards may differ in others. Builders without tables read all columns."""
        import datasets

        names = list(dict.fromkeys(str(column.steps[0]) for column in columns))
        builder: Any = self.builder
        if self.features is None or not hasattr(builder, "_cast_table"):
            return
        features = datasets.Features({name: self.features[name] for name in names})
        cast = builder._cast_table
        builder.info.features = features
        builder._cast_table = lambda table, **options: cast(
            table.select([name for name in table.column_names if name in features]), **options
        )
        if hasattr(builder.config, "columns"):  # parquet: the other columns are not even fetched
            builder.config.columns = names

    def name_at(self, state: Mapping[str, Any] | None) -> str:
        """Return the name of the shard in which a stream's state is."""
        number = shard_number(state or {})
        files = (self.builder.config.data_files or {}).get(self.split, [])
        return f"the shard {Path(str(files[number])).name}" if number < len(files) else f"shard {number}"


def shard_number(state: Mapping[str, Any]) -> int:
    """Return the number of the shard in a state of `datasets`, at any depth."""
    if "shard_idx" in state:
        return state["shard_idx"]
    return max((shard_number(inner) for inner in state.values() if isinstance(inner, Mapping)), default=0)


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
