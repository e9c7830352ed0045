"""Build ActivationData from text: the functions behind `data=stdlib`, `disassembly`, `text_files` and `hub`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge

from sae_lab.activations.data import ActivationData
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.checks import check_arguments
from sae_lab.text.bundled import DisassembledStdlib, StdlibDocuments
from sae_lab.text.corpora import FileDocuments, Format, Globs
from sae_lab.text.documents import Documents
from sae_lab.text.encoding import Encoder
from sae_lab.text.streams import HubDocuments
from sae_lab.text.text import Text


def from_documents(
    lm: LanguageModel,
    documents: Callable[[str], Documents],
    *,
    seq_len: int,
    pack: bool,
    order: Literal["shuffled", "as_read"],
    window_tokens: int | None = None,
    make: Callable[..., Any] = ActivationData,
    **stream: Any,
) -> Any:
    """Return activations on documents, tokenized with the language model's tokenizer.

    Args:
        lm: the language model.
        documents: `documents(split)` returns the documents of the split `train` or `held_out`.
        seq_len, pack, order, window_tokens: how documents become rows of tokens; see Text.
        make: `make(lm, text, **stream)` returns the result. A mixture takes only the text.
        stream: the other arguments of ActivationData.
    """
    encode = Encoder(lm.tokenizer)
    text = Text(documents, encode, lm.bos_id, seq_len=seq_len, pack=pack, order=order, window_tokens=window_tokens)
    return make(lm, text, **stream)


@check_arguments
def stdlib(lm: LanguageModel, seed: int, held_out_every: Annotated[int, Ge(2)], **stream: Any) -> ActivationData:
    """Return activations on the source of Python's standard library (`data=stdlib`)."""
    documents = partial(StdlibDocuments, seed=seed, held_out_every=held_out_every)
    return from_documents(lm, documents, seed=seed, **stream)


@check_arguments
def disassembly(
    lm: LanguageModel, seed: int, held_out_every: Annotated[int, Ge(2)], mixed: bool, **stream: Any
) -> ActivationData:
    """Return activations on bytecode listings of Python's standard library (`data=disassembly`)."""
    documents = partial(DisassembledStdlib, seed=seed, held_out_every=held_out_every, mixed=mixed)
    return from_documents(lm, documents, seed=seed, **stream)


@check_arguments
def text_files(
    lm: LanguageModel,
    paths: Globs,
    format: Format,
    column: Sequence[str] | str | None,
    seed: int,
    held_out_every: Annotated[int, Ge(2)],
    **stream: Any,
) -> ActivationData:
    """Return activations on local files or folders of `save_to_disk` (`data=text_files`)."""
    documents = partial(FileDocuments, paths, format=format, column=column, seed=seed, held_out_every=held_out_every)
    return from_documents(lm, documents, seed=seed, **stream)


@check_arguments
def hub(
    lm: LanguageModel,
    path: str,
    name: str | None,
    hub_split: str,
    column: Sequence[str] | str | None,
    seed: int,
    held_out_documents: Annotated[int, Ge(1)],
    held_out_every: Annotated[int, Ge(2)] | None,
    revision: str | None,
    **stream: Any,
) -> ActivationData:
    """Return activations on a streamed data set of the Hugging Face hub (`data=hub`, `fineweb`, `openwebtext`, ...)."""
    options: dict[str, Any] = {
        "name": name,
        "hub_split": hub_split,
        "column": column,
        "held_out_documents": held_out_documents,
        "held_out_every": held_out_every,
        "revision": revision,
    }
    return from_documents(lm, partial(HubDocuments, path, seed=seed, **options), seed=seed, **stream)
