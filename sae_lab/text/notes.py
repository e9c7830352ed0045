"""What a user should know of the documents: counted while they are cut into pieces, told once."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from sae_lab.text.current_part import part_prefix

log = logging.getLogger(__name__)


class Note(NamedTuple):
    """Something about a document: a key of SENTENCES, and a detail for the first one."""

    kind: str
    detail: str = ""


SENTENCES = {
    "special": (
        "{n:,} of {of:,} documents hold the strings of special tokens ({detail}), which are read as text: if they are "
        "special tokens, as in text that a chat template made, type data.special_tokens=parse."
    ),
    "skipped": "{n:,} of {of:,} chats are skipped: the first because {detail}",
    "system": (
        "The chat template takes no system message: in {n:,} of {of:,} chats it is put before the first message of the "
        "user."
    ),
    "content": "{n:,} of {of:,} chats hold the strings of special tokens in messages ({detail}): there they are text.",
}


class Notes:
    """Counts of notes and the detail of the first of each kind, among `of` documents."""

    def __init__(self) -> None:
        self.of, self.counts, self.details = 0, dict[str, int](), dict[str, str]()

    def add(self, note: Note | None) -> None:
        self.of += 1
        if note is not None:
            self.counts[note.kind] = self.counts.get(note.kind, 0) + 1
            self.details.setdefault(note.kind, note.detail)

    def add_all(self, pieces: Iterable[Any]) -> None:
        """Add the notes of documents, each with its first piece (a DocumentPiece)."""
        for piece in pieces:
            if piece.piece == 0:
                self.add(piece.note)

    def state_dict(self) -> dict[str, Any]:
        return {"of": self.of, "counts": self.counts, "details": self.details}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.of, self.counts, self.details = state["of"], dict(state["counts"]), dict(state["details"])

    def tell(self, told: set[str]) -> None:
        """Log a warning for each kind that is not in `told`, and add it there."""
        for kind, n in self.counts.items():
            if kind not in told:
                log.warning("%s%s", part_prefix(), SENTENCES[kind].format(n=n, of=self.of, detail=self.details[kind]))
                told.add(kind)
