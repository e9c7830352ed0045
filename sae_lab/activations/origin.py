"""What activations of text come from: for the provenance of an SAE, and for a run that resumes."""

from typing import Any

from sae_lab.activations.digests import digest_of_rows, weights_digest
from sae_lab.lm.base import LanguageModel
from sae_lab.text.text import TextSource, TrainingText


def origin_of(lm: LanguageModel, text: TextSource) -> dict[str, Any]:
    """Return what the provenance of an SAE says; see StreamData.origin."""
    return {
        "model": {"name": lm.name, "revision": getattr(getattr(lm.model, "config", None), "_commit_hash", None)},
        "sites": list(lm.sites),
        "tokenizer": {"name": lm.tokenizer.name_or_path, "vocab_size": len(lm.tokenizer)},
        "reading": dict(text.reading()),
        "bos": {"id": lm.bos_id, "policy": "first in every row of seq_len tokens, and between documents"},
    }


def digests_of(lm: LanguageModel, text: TrainingText) -> dict[str, str]:
    """Return digests of the weights, of what turns documents into ids, and of the text, or of its first 32 rows."""
    digest = text.identity()
    of_text = {"the text": digest} if digest else {"the first rows of the text": digest_of_rows(text.first_rows(32))}
    return {"the language model's weights": weights_digest(lm.model), **text.reader_digests(), **of_text}
