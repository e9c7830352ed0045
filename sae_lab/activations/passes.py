"""How many text rows the language model takes in one forward pass."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, TypeAlias

import torch
from annotated_types import Ge
from jaxtyping import Bool, Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import SettingError

PassTokens: TypeAlias = Annotated[int, Ge(1)] | Literal["auto"]

CPU_TOKENS = 4096
"""Tokens of a pass on a CPU: 32 rows of 128."""

GPU_TOKENS = 32_768
"""Tokens of a pass on a GPU. At gpt2's size an H200 gives 1.25 M tokens/s in passes of 4,096, and 2.17 M in these."""

MEMORY_SHARE = 1 / 8
"""Share of a GPU's memory that one pass may take, beside the model, the blocks and the SAE. It is a share of the whole
memory, not of what is free, because a resumed run must take the same passes to compute the same bits."""


def rows_per_pass(lm: LanguageModel, seq_len: int, rows: int | None, tokens: PassTokens) -> int:
    """Return the number of text rows in a forward pass: `rows` if given, else as many as have `tokens` tokens.

    At least one. `auto` is CPU_TOKENS or GPU_TOKENS; on a GPU it is halved until a pass takes no more than MEMORY_SHARE
    of the memory, by the peak of a pass of one row.

    Raises:
        SettingError: both are given.
    """
    if rows is not None:
        if tokens != "auto":
            raise SettingError(
                f"{{lm_batch_rows}}={rows} and {{lm_batch_tokens}}={tokens} exclude each other: give only one of them."
            )
        return rows
    if tokens == "auto":
        tokens = CPU_TOKENS
        if lm.device.type == "cuda":
            memory = torch.cuda.get_device_properties(lm.device).total_memory
            tokens = tokens_that_fit(GPU_TOKENS, peak_of_one_row(lm, seq_len) / seq_len, memory * MEMORY_SHARE)
    return max(1, tokens // seq_len)


def tokens_that_fit(most: int, bytes_per_token: float, memory: float) -> int:
    """Return `most`, halved until so many tokens take no more than `memory` bytes; at least 1.

    Halving makes small differences of the measured bytes count for nothing.
    """
    while most > 1 and most * bytes_per_token > memory:
        most //= 2
    return most


def peak_of_one_row(lm: LanguageModel, seq_len: int) -> int:
    """Return the bytes that a pass over one text row takes on a GPU at its peak."""
    tokens = torch.full((1, seq_len), lm.bos_id)
    lm.activations(tokens)  # the first pass also allocates the workspaces of cuBLAS, which stay
    before = torch.cuda.memory_allocated(lm.device)
    torch.cuda.reset_peak_memory_stats(lm.device)
    lm.activations(tokens)
    return torch.cuda.max_memory_allocated(lm.device) - before


class TextPass(NamedTuple):
    """Text rows for one forward pass of the language model, and the batches that an SAE makes of them."""

    tokens: Int[Tensor, "n t"]
    rows: list[int]
    """Text rows of each batch."""


def plan_passes(rows: Int[Tensor, "r t"], batch_size: int, lm_batch_rows: int) -> Iterator[TextPass]:
    """Divide text rows into batches of about `batch_size` tokens, and those into passes of `lm_batch_rows`.

    The batches depend on batch_size and seq_len only. A pass has one batch at least.
    """
    n = math.ceil(batch_size / rows.shape[1])
    batches = rows.tensor_split(max(1, round(len(rows) / n)))
    at_once = max(1, lm_batch_rows // n)
    for first in range(0, len(batches), at_once):
        mine = batches[first : first + at_once]
        yield TextPass(torch.cat(mine), [len(tokens) for tokens in mine])


def batch_sizes(keep: Bool[Tensor, "n t"], rows: list[int]) -> list[int]:
    """Return the number of kept positions of each batch of text rows, without empty batches unless all are."""
    sizes = [int(mask.sum()) for mask in keep.split(rows)]
    return [size for size in sizes if size] or [0]
