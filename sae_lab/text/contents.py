"""What a document may be: text, a chat, or token ids. And where a row of a data set holds it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_lab.runtime.errors import UserError
from sae_lab.text.columns import Column, excerpt, text_of, values_at
from sae_lab.text.messages import messages_of

Kind = Literal["text", "chat", "tokens"]
TEXT: frozenset[str] = frozenset({"text"})
TOKENS: frozenset[str] = frozenset({"tokens"})


@dataclass(frozen=True)
class Chat:
    """Messages of {"role", "content"}; none if there was nothing, or if `problem` says what is wrong."""

    messages: tuple[dict[str, str], ...] = ()
    problem: str = ""

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.messages)

    def to_json(self) -> str:
        return json.dumps(self.problem or self.messages, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Chat":
        value = json.loads(text)
        return cls(problem=value) if isinstance(value, str) else cls(tuple(value))


class Tokens(NamedTuple):
    """Token ids that were there before, and where they are, for an error message. As long as there are ids."""

    ids: NDArray[Any]
    where: str

    def __len__(self) -> int:
        return len(self.ids)


class Templated(str):
    """Text in which special tokens are parsed. Those in messages of users are broken by MARK (see chats.py)."""


MARK = "\ufdd0"  # a code point that Unicode reserves for such uses; no text holds it
Document = str | Chat | Tokens


class Content(NamedTuple):
    """Which columns hold a document, and of what kind it is.

    Columns of a chat: one of messages, or the questions and the answer. Of tokens: the ids and perhaps a mask. Columns
    that say on which tokens a language model is trained are `ignored`.
    """

    kind: Kind
    columns: tuple[Column, ...]
    ignored: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Top-level names of the columns."""
        return list(dict.fromkeys(str(column.steps[0]) for column in self.columns))

    def read(self, row: Mapping[str, Any], where: str = "a row of the data") -> Document:
        """Return the document of a row.

        Raises:
            UserError: a text is neither a string nor a number, or ids are no whole numbers; `where` names the row.
        """
        if self.kind == "text":
            return text_of(row, self.columns, where)
        return self._tokens(row, where) if self.kind == "tokens" else self._chat(row, where)

    def _chat(self, row: Mapping[str, Any], where: str) -> Chat:
        try:
            if len(self.columns) == 1:
                return Chat(messages_of(next(values_at(row, self.columns[0].steps))))
            *asked, answered = (text_of(row, [column], where) for column in self.columns)
            turns = (("user", "\n\n".join(filter(None, asked))), ("assistant", answered))
            return Chat(tuple({"role": role, "content": content} for role, content in turns if content))
        except (TypeError, AttributeError, UserError) as e:
            return Chat(problem=f"{where}: {e}")

    def _tokens(self, row: Mapping[str, Any], where: str) -> Tokens:
        values, *masks = ([*values_at(row, column.steps)] for column in self.columns)
        ids = integers([] if values == [None] else values, where)
        kept = np.ones(len(ids), bool)
        for column, mask in zip(self.columns[1:], masks, strict=True):
            if len(mask) != len(ids):
                raise UserError(f"{where} has {len(ids)} ids and a mask of {len(mask)}: mend it, or leave it out.")
            kept &= booleans(mask, column.path, where)
        ids = ids[kept]
        return Tokens(ids, where)


def integers(values: Sequence[Any], where: str) -> NDArray[np.int64]:
    """Return the values as an array; raise a UserError if one is no whole number."""
    array = as_array(values)
    if array is None or array.dtype.kind not in "iu":
        raise UserError(f"{where} holds {excerpt(values, 30)!r} in the place of token ids: mend it, or leave it out.")
    return array.astype(np.int64)


def booleans(values: Sequence[Any], name: str, where: str) -> NDArray[np.bool_]:
    """Return a mask of booleans, or of 0 and 1, as an array; raise a UserError if a value is none of these."""
    array = as_array(values)
    if array is None or array.dtype.kind not in "iub" or not np.isin(array, (0, 1)).all():
        raise UserError(
            f"{where} holds {excerpt(values, 30)!r} in its mask {name} in the place of 0 and 1, or false and true: "
            "mend it, or leave it out."
        )
    return array.astype(bool)


def as_array(values: Sequence[Any]) -> NDArray[Any] | None:
    """Return the values as an array with one axis; None if they are lists."""
    try:
        array = np.asarray(values if len(values) else np.empty(0, np.int64))
    except ValueError:  # lists of different lengths
        return None
    return array if array.ndim == 1 else None


def cleaned(document: Document, clean: Callable[[str], str]) -> Document:
    """Return a document whose strings are cleaned."""
    if isinstance(document, Chat):
        messages = tuple({**message, "content": clean(message["content"])} for message in document.messages)
        return Chat(messages, clean(document.problem))
    return clean(document) if isinstance(document, str) else document


def beginning(document: Document) -> str:
    """Return the beginning of a document as people read it."""
    if isinstance(document, Tokens):
        return " ".join(map(str, document.ids[:20]))
    if isinstance(document, Chat):
        return "  ".join(f"{message['role']}: {message['content']}" for message in document.messages[:4])
    return document
