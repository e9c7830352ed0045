"""Text to token ids: the one place that calls a tokenizer."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

TOGETHER = max(2**21, 2**19 * (os.cpu_count() or 1))
"""Characters that are tokenized together: several pieces for each core. A token takes about 100 bytes meanwhile."""
Ids = NDArray[Any]  # token ids of a piece of a document, one axis


class Encode(Protocol):
    """Turns pieces of documents into token ids. For documents that are ids already it needs no tokenizer.

    Attributes:
        dtype: uint16 if all ids fit, otherwise uint32; little-endian.
        digest: changes when the ids of a text change.
    """

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def digest(self) -> str: ...

    def __call__(self, pieces: Sequence[Any]) -> list[Ids]: ...


class Encoder:
    """Tokenize pieces of text, without special tokens; text that looks like a special token is plain text.

    A tokenizer with a Rust back end encodes the pieces in parallel on all cores, without Python's lock. Another one is
    called for each piece. The ids are those of `tokenizer(text, add_special_tokens=False, split_special_tokens=True)`.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, pieces: Sequence[str]) -> list[Ids]:
        rust = getattr(self.tokenizer, "backend_tokenizer", None)
        if rust is None:
            call = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return [np.array(self.tokenizer(text, **call)["input_ids"], dtype=self.dtype) for text in pieces]
        # Calls of the tokenizer elsewhere set these three as they need them.
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        encodings = rust.encode_batch_fast(list(pieces), add_special_tokens=False)  # "fast": without offsets
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        largest = max(self.tokenizer.get_vocab().values(), default=2**32 - 1)
        return np.dtype("<u2" if largest < 2**16 else "<u4")

    @cached_property
    def digest(self) -> str:
        return tokenizer_digest(self.tokenizer)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the full tokenizer; of its vocabulary only, if it has no Rust back end."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    text = rust.to_str() if rust is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_128_hexdigest(text.encode())
