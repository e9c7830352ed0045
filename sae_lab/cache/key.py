"""The key of a cache: every setting that determines its activations. A cache is used only if its key matches."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sae_lab.activations.data import ActivationData
from sae_lab.activations.digests import digest_of_rows, tokenizer_digest, weights_digest
from sae_lab.cache.shards import FORMAT
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import UserError
from sae_lab.text.documents import TRAIN, Documents
from sae_lab.text.rows import take_rows


def lm_key(lm: LanguageModel) -> dict[str, Any]:
    """Return what determines a language model's activations, independent of where it was loaded from."""
    return {
        "format": FORMAT,
        "lm.backend": type(lm).__name__,
        "lm.sites": list(lm.sites),
        "lm.dtype": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "lm.bos_id": lm.bos_id,
        "lm.tokenizer": tokenizer_digest(lm.tokenizer),
        "lm.weights": weights_digest(lm.model),
    }


def data_key(data: ActivationData) -> dict[str, Any]:
    """Return what determines the activations besides the language model.

    The text is identified by its digest and, because not every source has one, by its first rows.

    Raises:
        UserError: the data are not text.
    """
    if data.documents is None:
        raise UserError("a cache can only be harvested from text: choose another data=..., such as data=stdlib.")
    text = data.text(TRAIN, repeat=False)
    return {
        "seq_len": data.seq_len,
        "data.exclude_bos": data.exclude_bos,
        "data.exclude_first": data.exclude_first,
        "data.pack": data.pack,
        "data.repeat": data.repeat,
        **{f"data.{name}": value for name, value in describe_documents(data.documents).items()},
        "data.digest": text.documents.digest(),
        "data.first_rows": digest_of_rows(take_rows(text, data.digest_rows)),
    }


def describe_documents(documents: Callable[[str], Documents]) -> dict[str, Any]:
    """Return the class and the arguments of a `functools.partial`, as plain values."""
    if not isinstance(documents, functools.partial):
        return {"documents": getattr(documents, "__qualname__", repr(documents))}
    arguments = inspect.signature(documents.func).bind_partial(*documents.args, **documents.keywords).arguments
    return {"documents": documents.func.__name__} | arguments
