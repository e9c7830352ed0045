"""Documents to token ids: the one place that calls a tokenizer."""

import json
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.files import digest_of_json
from sae_lab.text.chats import ChatTemplate, SpecialStrings
from sae_lab.text.contents import MARK, TEXT, TOKENS, Chat, Document, Templated, Tokens
from sae_lab.text.documents import PIECE, cut
from sae_lab.text.notes import Note

TOGETHER = max(2**21, 2**19 * (os.cpu_count() or 1))
"""Characters that are tokenized together: several pieces for each core. A token takes about 100 bytes meanwhile."""
Ids = NDArray[Any]  # token ids of a piece of a document, one axis


class Cut(NamedTuple):
    """The pieces of a document, and what there is to say of it."""

    pieces: Sequence[Any]
    note: Note | None = None


class Encode(Protocol):
    """Turns documents into pieces, and pieces into token ids.

    Attributes:
        dtype: uint16 if all ids fit, otherwise uint32; little-endian.
        told: kinds of notes that the user has been told.
    """

    told: set[str]

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def digest(self, kinds: Collection[str] = TEXT) -> str:
        """Return what changes when the ids of documents of these kinds change; empty if no tokenizer is needed."""
        ...

    def gives_bos(self, kinds: Collection[str]) -> bool:
        """Whether a BOS among the ids is one. In text that is read as text it is an ordinary token."""
        ...

    def check(self, kinds: Collection[str]) -> None:
        """Raise a UserError if documents of these kinds cannot be encoded."""
        ...

    def cut(self, document: Any) -> Cut: ...

    def __call__(self, pieces: Sequence[Any]) -> list[Ids]: ...


class Encoder:
    """Token ids of text, chats and token ids (see contents.py).

    Text is tokenized without special tokens; what looks like one is plain text. With special_tokens="parse" it becomes
    the special token. Chats are rendered by the chat template, whose special tokens are parsed, those in messages not.
    Token ids are taken as they are, and no tokenizer is called.

    A tokenizer with a Rust back end encodes the pieces in parallel on all cores, without Python's lock. Another one is
    called for each piece. The ids are those of `tokenizer(text, add_special_tokens=False, split_special_tokens=True)`;
    where special tokens are parsed, with `split_special_tokens=False`.
    """

    def __init__(self, tokenizer: Any, special_tokens: Literal["text", "parse"] = "text"):
        self.tokenizer, self.parse = tokenizer, special_tokens == "parse"
        self.special = SpecialStrings(tokenizer)
        self.template = ChatTemplate(tokenizer, self.special)
        self.told = set[str]()

    def cut(self, document: Document) -> Cut:
        """Return the pieces of a document: text, Templated, or arrays of ids.

        Raises:
            UserError: a token id is not in the vocabulary.
        """
        if isinstance(document, Tokens):
            return Cut(cut(self._checked(document)))
        if isinstance(document, Chat):
            text, note = self.template.render(document)
            return Cut(self._cut_templated(text), note)
        if self.parse:
            return Cut(self._cut_templated(Templated(document)))
        found = self.special.first_in(document)
        return Cut(cut(document), Note("special", found) if found else None)

    def _cut_templated(self, text: Templated) -> list[Templated]:
        pieces, start = list[Templated](), 0
        while start < len(text):
            end = start + PIECE if len(text) - start > PIECE else len(text)
            end = self.special.end_of_piece(text, start, end) if end < len(text) else end
            pieces.append(Templated(text[start:end]))
            start = end
        return pieces

    def _checked(self, tokens: Tokens) -> Ids:
        n = self.n_ids or 2**32
        bad = tokens.ids[(tokens.ids < 0) | (tokens.ids >= n)]
        if len(bad):
            raise UserError(
                f"{tokens.where} holds the token id {bad[0]:,}, and the model's vocabulary has {n:,}: give data that "
                "were tokenized for this model, or the model that they were tokenized for."
            )
        return tokens.ids

    def __call__(self, pieces: Sequence[Any]) -> list[Ids]:
        ids = {i: np.asarray(piece, self.dtype) for i, piece in enumerate(pieces) if not isinstance(piece, str)}
        text = [i for i, piece in enumerate(pieces) if isinstance(piece, str) and not isinstance(piece, Templated)]
        ids |= zip(text, self._encode([pieces[i] for i in text], parse=False), strict=True)
        templated = [i for i, piece in enumerate(pieces) if isinstance(piece, Templated)]
        ids |= zip(templated, self._encode_templated([pieces[i] for i in templated]), strict=True)
        return [ids[i] for i in range(len(pieces))]

    def _encode_templated(self, texts: list[Templated]) -> list[Ids]:
        """Tokenize texts with their special tokens, but for those that are broken by MARK."""
        parts = [text.split(MARK) for text in texts]
        encoded = iter(self._encode([part for several in parts for part in several], parse=True))
        return [np.concatenate([next(encoded) for _ in several]) for several in parts]

    def _encode(self, texts: list[str], parse: bool) -> list[Ids]:
        rust = getattr(self.tokenizer, "backend_tokenizer", None)
        if rust is None:
            call = {"add_special_tokens": False, "split_special_tokens": not parse, "verbose": False}
            return [np.array(self.tokenizer(text, **call)["input_ids"], dtype=self.dtype) for text in texts]
        if not texts:
            return []
        # Calls of the tokenizer elsewhere set these three as they need them.
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = not parse
        encodings = rust.encode_batch_fast(texts, add_special_tokens=False)  # "fast": without offsets
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    @cached_property
    def n_ids(self) -> int:
        """Token ids are below this number; 0 if the tokenizer does not say."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if 0 < self.n_ids <= 2**16 else "<u4")

    def digest(self, kinds: Collection[str] = TEXT) -> str:
        if set(kinds) == TOKENS:
            return ""
        parsed = ["parse"] if self.parse and "text" in kinds else []
        if "chat" in kinds:
            parsed.append(self.template.digest)
        digest = tokenizer_digest(self.tokenizer)
        return digest_of_json([digest, *parsed]) if parsed else digest

    def gives_bos(self, kinds: Collection[str]) -> bool:
        return self.parse or set(kinds) != TEXT

    def check(self, kinds: Collection[str]) -> None:
        if "chat" in kinds and not self.template.exists:
            raise SettingError(
                "the data are chats, and the tokenizer of the language model has no chat template: choose an instruct "
                "model, or its tokenizer with lm.tokenizer=NAME, or read plain text with {column}=NAME, such as "
                "{column}=messages.content or {column}=conversations.value."
            )


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the full tokenizer; of its vocabulary only, if it has no Rust back end."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    text = rust.to_str() if rust is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_128_hexdigest(text.encode())
