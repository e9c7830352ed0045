"""Which token ids a language model takes, and which one begins a row."""

from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.runtime.errors import SettingError, UserError

LM: TypeAlias = Any
"""A LanguageModel, whose file imports this one."""


def place_tokens(lm: LM, tokens: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """Return the tokens on the model's device.

    Raises:
        UserError: they are no rows, the rows exceed the model's context, or an id the embedding. (On a GPU, an id
            beyond it would end the process. Rows of text are on the CPU, where looking costs microseconds.)
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        is_tensor = isinstance(tokens, Tensor)
        given = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
        raise UserError(f"tokens must be rows of token ids, a tensor of integers (n, t), not {given}.")
    if lm.context is not None and tokens.shape[1] > lm.context:
        raise UserError(
            f"seq_len={tokens.shape[1]} exceeds the context of {lm.name}: use seq_len={lm.context} or less."
        )
    if lm.n_ids is not None and tokens.device.type == "cpu" and tokens.numel():
        check_ids(tokens, lm.n_ids, lm.name, lm.tokenizer)
    return tokens.to(lm.device)


def check_ids(tokens: Int[Tensor, "n t"], n_ids: int, name: str, tokenizer: Any) -> None:
    """Raise a UserError that names the token if an id is not in the embedding."""
    low, high = (int(x) for x in torch.aminmax(tokens))
    if low < 0 or high >= n_ids:
        wrong = low if low < 0 else high
        token = tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 else None
        spelled = f" ({token!r})" if token else ""
        raise UserError(
            f"token id {wrong}{spelled} is beyond the embedding of {name}, which has {n_ids} rows: "
            "give lm.tokenizer=<folder or hub name of the tokenizer that the model was trained with>."
        )


def find_bos_id(name: str, tokenizer: Any, bos_id: int | None, n_ids: int | None) -> int:
    """Return the given id (which may be 0), else the tokenizer's BOS, else its EOS.

    Raises:
        UserError: the tokenizer has neither, or the id is outside the embedding.
    """
    for candidate in (bos_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            if candidate < 0 or (n_ids is not None and candidate >= n_ids):
                most = "" if n_ids is None else f", and at most {n_ids - 1}"
                raise SettingError(
                    f"{{bos_id}}={candidate} is not a token id of {name}: give {{bos_id}}=... of at least 0{most}."
                )
            return int(candidate)
    raise SettingError(
        f"the tokenizer of {name} has neither a BOS nor an EOS token: set the token id to use with {{bos_id}}=..."
    )
