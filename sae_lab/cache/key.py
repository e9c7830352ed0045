"""The key of a cache: every setting that determines its activations. A cache is used only if its key matches."""

from typing import Any

from sae_lab.activations.data import ActivationData
from sae_lab.activations.digests import digest_of_rows, weights_digest
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import UserError
from sae_lab.text.documents import TRAIN, describe_documents
from sae_lab.text.encoding import tokenizer_digest
from sae_lab.text.mixture import MixedText
from sae_lab.text.text import Text, TrainingText


def lm_key(lm: LanguageModel) -> dict[str, Any]:
    """Return what determines a language model's activations, independent of where it was loaded from."""
    return {
        "lm.backend": type(lm).__name__,
        "lm.sites": list(lm.sites),
        "lm.dtype": str(lm.dtype).removeprefix("torch."),
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
    text = data.text
    if not isinstance(text, TrainingText):
        raise UserError("a cache can only be harvested from text: choose another data=..., such as data=stdlib.")
    return {
        "seq_len": text.seq_len,
        **{f"data.{name}": value for name, value in data.positions.settings().items()},
        "data.pack": text.pack,
        "data.repeat": data.repeat,
        **order_key(text),
        **text_key(text, "data"),
        "data.first_rows": digest_of_rows(text.first_rows(data.fixed_rows)),
    }


def order_key(text: TrainingText) -> dict[str, Any]:
    """Return what decides the order of the text rows; nothing for the only order that older caches have."""
    if text.order == "as_read":
        return {}
    return {"data.order": text.order, "data.window_tokens": getattr(text, "window_tokens", None)}


def text_key(text: TrainingText, place: str) -> dict[str, Any]:
    """Return what identifies a text, or the parts of a mixture. `place` is the key of the text."""
    if isinstance(text, MixedText):
        key: dict[str, Any] = {f"{place}.shares": [part.share for part in text.parts]}
        for part in text.parts:
            key |= {f"{place}.{part.key}.window_tokens": part.text.window_tokens}
            key |= text_key(part.text, f"{place}.{part.key}")
        return key
    assert isinstance(text, Text)
    documents = {f"{place}.{name}": value for name, value in describe_documents(text.documents).items()}
    reading = {f"{place}.reading": reading} if (reading := text.reading()) else {}
    return documents | reading | {f"{place}.digest": text.documents(TRAIN).digest()}
