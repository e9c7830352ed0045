"""Build ActivationData from text: the functions behind `data=stdlib`, `disassembly`, `text_files`, `tokens`, `hub`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge

from sae_lab.activations.data import ActivationData
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError
from sae_lab.text.bundled import DisassembledStdlib, StdlibDocuments
from sae_lab.text.choice import ChatSetting
from sae_lab.text.contents import TOKENS
from sae_lab.text.corpora import FileDocuments, Format, Globs
from sae_lab.text.documents import Documents
from sae_lab.text.encoding import Encoder
from sae_lab.text.in_memory import ListDocuments
from sae_lab.text.streams import HubDocuments
from sae_lab.text.text import Text
from sae_lab.text.token_files import TokenFiles, TokenType, are_token_files

SpecialTokens = Literal["text", "parse"]


def from_documents(
    lm: LanguageModel,
    documents: Callable[[str], Documents],
    *,
    seq_len: int,
    pack: bool,
    order: Literal["shuffled", "as_read"],
    window_tokens: int | None = None,
    special_tokens: SpecialTokens = "text",
    make: Callable[..., Any] = ActivationData,
    **stream: Any,
) -> Any:
    """Return activations on documents, tokenized with the language model's tokenizer unless they are token ids.

    Args:
        lm: the language model.
        documents: `documents(split)` returns the documents of the split `train` or `held_out`.
        seq_len, pack, order, window_tokens: how documents become rows of tokens; see Text.
        special_tokens: whether text that looks like a special token is text, or is parsed; see Encoder.
        make: `make(lm, text, **stream)` returns the result. A mixture takes only the text.
        stream: the other arguments of ActivationData.
    """
    encode = Encoder(lm.tokenizer, special_tokens)
    text = Text(documents, encode, lm.bos_id, seq_len=seq_len, pack=pack, order=order, window_tokens=window_tokens)
    return make(lm, text, **stream)


@check_arguments
def stdlib(lm: LanguageModel, seed: int, held_out_every: Annotated[int, Ge(2)], **stream: Any) -> ActivationData:
    """Return activations on the source of Python's standard library (`data=stdlib`)."""
    documents = partial(StdlibDocuments, seed=seed, held_out_every=held_out_every)
    return from_documents(lm, documents, seed=seed, **stream)


@check_arguments
def in_memory(
    lm: LanguageModel,
    seed: int,
    held_out_every: Annotated[int, Ge(1)],
    documents: Sequence[str] | None = None,
    **stream: Any,
) -> ActivationData:
    """Return activations on a list of strings, which only Python can give."""
    if documents is None:
        raise SettingError(
            "the documents of this run were a list in memory: save them as files and give data.* of data=text_files."
        )
    texts = partial(ListDocuments, documents, seed=seed, held_out_every=held_out_every)
    return from_documents(lm, texts, seed=seed, **stream)


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
    chat: ChatSetting,
    special_tokens: SpecialTokens,
    seed: int,
    held_out_every: Annotated[int, Ge(2)],
    **stream: Any,
) -> ActivationData:
    """Return activations on local files or folders of `save_to_disk` (`data=text_files`)."""
    options: dict[str, Any] = {"format": format, "column": column, "chat": chat}
    documents = partial(FileDocuments, paths, seed=seed, held_out_every=held_out_every, **options)
    return from_documents(lm, documents, seed=seed, special_tokens=special_tokens, **stream)


@check_arguments
def tokens(
    lm: LanguageModel,
    paths: Globs,
    column: str,
    dtype: TokenType | None,
    seed: int,
    held_out_every: Annotated[int, Ge(2)],
    **stream: Any,
) -> ActivationData:
    """Return activations on token ids: .bin and .npy files, or a column of lists in other files (`data=tokens`)."""
    options: dict[str, Any] = {"seed": seed, "held_out_every": held_out_every}
    if are_token_files([paths] if isinstance(paths, str) else paths):
        ends = {"bos_id": lm.bos_id, "eos_id": lm.tokenizer.eos_token_id}
        n_ids = Encoder(lm.tokenizer).n_ids
        documents: Any = partial(TokenFiles, paths, dtype=dtype, n_ids=n_ids, **ends, **options)
    else:
        documents = partial(FileDocuments, paths, column=column, **options)
    make = stream.pop("make", ActivationData)

    def make_of_tokens(lm: LanguageModel, text: Text, **rest: Any) -> Any:
        if text.kinds() != TOKENS:
            raise SettingError(f"{{column}}={column} holds no token ids: type data=text_files for text and chats.")
        return make(lm, text, **rest)

    return from_documents(lm, documents, seed=seed, make=make_of_tokens, **stream)


@check_arguments
def hub(
    lm: LanguageModel,
    path: str,
    name: str | None,
    hub_split: str,
    column: Sequence[str] | str | None,
    chat: ChatSetting,
    special_tokens: SpecialTokens,
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
        "chat": chat,
        "held_out_documents": held_out_documents,
        "held_out_every": held_out_every,
        "revision": revision,
    }
    documents = partial(HubDocuments, path, seed=seed, **options)
    return from_documents(lm, documents, seed=seed, special_tokens=special_tokens, **stream)
