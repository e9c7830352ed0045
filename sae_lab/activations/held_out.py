"""Held-out data of an evaluation, in parts whose activations fit in memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.passes import TextPass, batch_sizes, plan_passes
from sae_lab.activations.positions import Positions
from sae_lab.runtime.errors import UserError
from sae_lab.text.text import TextSource


class HeldOutRows(NamedTuple):
    """The activations of a part of HeldOut.

    Args:
        x: the activations.
        sizes: rows of each batch that an SAE sees, about those of training.
        at_bos: which rows are at BOS tokens.
    """

    x: Float[Tensor, "n s d"]
    sizes: list[int]
    at_bos: Bool[Tensor, " n"]


class HeldOut(NamedTuple):
    """Held-out data of an evaluation.

    Args:
        parts: what is read together: text rows, or ranges of rows.
        n_tokens: tokens (rows, for activations without text) of all parts.
        too_few: there are fewer than asked for.
        read: returns the activations of a part; raises a UserError if they are not finite.
    """

    parts: Sequence[Any]
    n_tokens: int
    too_few: bool
    read: Callable[[Any], HeldOutRows]


def shuffled_rows(text: TextSource, n_tokens: int) -> Int[Tensor, "r t"]:
    """Return the first held-out text rows, n_tokens in all, but at least one row and at most one pass over the text.

    They are shuffled, always in the same way, so that consecutive rows come from different documents.

    Raises:
        UserError: there is no whole row.
    """
    rows = text.held_out(max(1, n_tokens // text.seq_len))
    if len(rows) == 0:
        raise UserError(
            f"the held-out text is shorter than one row of seq_len={text.seq_len} tokens: "
            "give more text, or lower seq_len."
        )
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def held_out_text(
    rows: Int[Tensor, "r t"], n_tokens: int, positions: Positions, batch_size: int, lm_batch_rows: int
) -> HeldOut:
    """Return held-out text rows in parts of whole rows that hold about a training batch.

    Args:
        n_tokens: tokens that were asked for.

    Raises:
        UserError: every position is left out.
    """
    parts = [*plan_passes(rows, batch_size, lm_batch_rows)]
    if not any(positions.mask(part.tokens).any() for part in parts):
        raise UserError("data.exclude_* leaves out every held-out token: raise data.n_eval_tokens.")
    return HeldOut(parts, rows.numel(), len(rows) < n_tokens // rows.shape[1], partial(read_pass, positions))


def read_pass(positions: Positions, part: TextPass) -> HeldOutRows:
    """Return the activations of text rows."""
    keep, x = positions.read(part.tokens)
    return HeldOutRows(x, batch_sizes(keep, part.rows), part.tokens[keep] == positions.lm.bos_id)
