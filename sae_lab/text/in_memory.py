"""Documents in memory: a list of strings."""

from collections.abc import Sequence
from functools import cached_property

import xxhash

from sae_lab.runtime.errors import SettingError
from sae_lab.text.documents import TRAIN, IndexedDocuments


class ListDocuments(IndexedDocuments):
    """A list of texts. One in `held_out_every` is held out; 1: all are in both splits, for an evaluation alone.

    Raises:
        SettingError: there are fewer documents than `held_out_every`, or a document is no string.
    """

    def __init__(self, documents: Sequence[str], split: str, *, seed: int, held_out_every: int):
        super().__init__(seed, split)
        if wrong := [type(text).__name__ for text in documents if not isinstance(text, str)]:
            raise SettingError(f"documents must be strings, not {wrong[0]}: give row['text'] of each row.")
        if len(documents) < held_out_every:
            raise SettingError(
                f"{len(documents)} documents are too few to hold out one in {{held_out_every}}={held_out_every}: "
                "give more documents, or lower {held_out_every}."
            )
        last = held_out_every - 1
        self.texts = [
            text
            for i, text in enumerate(documents)
            if held_out_every == 1 or (i % held_out_every == last) == (split != TRAIN)
        ]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> str:
        return self.texts[i]

    @cached_property
    def _digest(self) -> str:
        digest = xxhash.xxh3_128()
        for text in self.texts:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\xff")
        return digest.hexdigest()

    def digest(self, thorough: bool = True) -> str:
        return self._digest

    def fingerprint(self) -> str:
        return self._digest
