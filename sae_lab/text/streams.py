"""Documents of the Hugging Face hub, streamed with `datasets`."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Annotated, Any

from annotated_types import Ge

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.text.choice import ChatSetting, choose_content, described
from sae_lab.text.columns import SAMPLE, escaped, features_of
from sae_lab.text.contents import beginning
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents, Place, Window, take_window
from sae_lab.text.saved import is_saved
from sae_lab.text.shards import Shards, commit_on_hub, quiet, root_cause

log = logging.getLogger(__name__)

PAUSES = (1, 2, 4, 8, 16, 32)
"""Seconds to wait before a window of a data set on the hub is tried again; `datasets` has retried each read before."""


class HubDocuments(Documents):
    """A data set of the Hugging Face hub, or a local folder in the hub's format, streamed in its own order.

    The first `held_out_documents` documents belong to the split `held_out`; with `held_out_every`, so many of which
    each is the last of `held_out_every` documents. Training skips them. To resume, `datasets` skips the shards that
    were read completely and rereads the beginning of the current one. Only the columns of the text are read. A window
    that cannot be read is tried again, if the data set is on the hub, after the pauses of PAUSES.

    `revision` (a branch, a tag or a commit) pins the text. The digest of the text is the commit on the hub.

    Raises:
        UserError: the data set or its revision cannot be reached or read, no column is plainly the text, or all
            documents are held out.
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
        held_out_every: Annotated[int, Ge(2)] | None = None,
        chat: ChatSetting = "auto",
    ):
        super().__init__(seed, split)
        if is_saved(Path(path).expanduser()):
            path = escaped(path)
            raise SettingError(
                f"{{path}}={path} was written by save_to_disk: type data=text_files data.paths=[{path}]."
            )
        self.path, self.split, self.commit = path, split, commit_on_hub(path, revision)
        self.n_held_out, self.every = held_out_documents, held_out_every
        self.shards = Shards(path, hub_split, name=name, revision=self.commit or revision)
        sample = self.shards.sample(SAMPLE) if column is None or self.shards.features is None else []
        self.content = choose_content(self.shards.features or features_of(sample), column, sample, chat)
        self.kinds = frozenset({self.content.kind})
        self.shards.narrow(self.content.columns)
        self.rows = self._split(self.shards.rows())

    def _split(self, rows: Any) -> Any:
        held_out, every, n = self.split == HELD_OUT, self.every, self.n_held_out
        if every is None:
            return rows.take(n) if held_out else rows.skip(n)
        chosen = rows.filter(lambda _, i: (i % every == every - 1 and i < n * every) == held_out, with_indices=True)
        return chosen.take(n) if held_out else chosen

    def digest(self, thorough: bool = True) -> str:
        return self.commit or ""

    def describe(self) -> str:
        first = self.shards.first(1)
        n_documents = f"{n:,}" if (n := self.shards.n_documents) else "an unknown number of"
        line = described(self.content, n_documents, beginning(self.content.read(first[0])) if first else "")
        every = f"one in {self.every:,} of the first {self.n_held_out * self.every:,}" if self.every else None
        return f"{line}; held out: {every or f'the first {self.n_held_out:,}'}"

    def windows(self, epoch: int, place: Place | None) -> Iterator[Window]:
        place = place or {"window": 0, "rows": None}
        texts = None
        while True:
            texts, window = self._window(place["rows"], texts)
            if not window:
                break
            after = {"window": place["window"] + 1, "rows": self.rows.state_dict()}
            yield Window(place, window, after)
            place = after
        if place["window"] == 0 and self.split == TRAIN:
            self._explain_nothing()

    def _window(self, state: Any, texts: Iterator[Any] | None) -> tuple[Iterator[Any], list[Any]]:
        """Return the iterator of the texts and their next window; read from the state on if there is no iterator yet.

        Raises:
            UserError: the window cannot be read. Its beginning is the last place that a checkpoint holds.
        """
        for pause in (*(PAUSES if self.commit else ()), None):
            try:
                if texts is None:
                    self.rows.load_state_dict(state)
                    texts = (self.content.read(row, f"a row of data.path={self.path}") for row in self.rows)
                with quiet():
                    return texts, take_window(texts)
            except UserError:
                raise
            except Exception as e:
                shard = self.shards.name_at(self.rows.state_dict())
                if pause is None:
                    raise UserError(
                        f"{shard} of data.path={self.path} cannot be read ({root_cause(e)}): "
                        "once it can, the same command continues from the last checkpoint."
                    ) from e
                log.warning("%s cannot be read (%s): trying again in %d seconds.", shard, root_cause(e), pause)
                sleep(pause)
                texts = None
        raise AssertionError

    def _explain_nothing(self) -> None:
        """Raise a UserError if all documents are held out, so that none is left to train on."""
        n = len(self.shards.first(self.n_held_out * (self.every or 1)))
        if n:
            raise UserError(
                f"data.path={self.path} has {n:,} documents, and data.held_out_documents={self.n_held_out} leaves none "
                f"of them to train on: type data.held_out_documents={max(1, n // 10)}."
            )
