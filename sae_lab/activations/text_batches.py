"""Batches of whole text rows, for losses that need what the language model makes of the activations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.buffer import Filling
from sae_lab.activations.columns import Columns
from sae_lab.parallel.agreement import stop_together
from sae_lab.parallel.mesh import data_axis
from sae_lab.runtime.errors import SettingError
from sae_lab.text.rows import RowStream

Kept = Callable[[Int[Tensor, "n t"]], tuple[Bool[Tensor, "n t"], Float[Tensor, "b s d"]]]


@dataclass(frozen=True)
class TextBatch:
    """Text rows, and the activations at the positions on which an SAE is trained.

    `len` is the number b of activations. `to` moves these alone: the language model takes tokens from the CPU.
    """

    tokens: Int[Tensor, "n t"]
    keep: Bool[Tensor, "n t"]
    """The b positions, in the order of x."""
    x: Float[Tensor, "b s d"]

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "TextBatch":
        return replace(self, x=self.x.to(device))

    def at(self, columns: Columns) -> "TextBatch":
        """Return the batch at some of its sites."""
        return replace(self, x=columns(self.x))


class TextBatches:
    """Iterator over batches of `rows_per_batch` text rows, in the order of the text. The last batch may be smaller.

    Takes the place of ShuffledBlocks: the rows of text are shuffled, but the positions of a row stay together. Each of
    n ranks takes its share of the text rows of every batch.

    Args:
        rows: the text.
        kept: returns a mask of the positions to keep, and the activations there.
        seq_len: tokens of a text row.
        batch_size: tokens of a batch; see check_whole_rows.
        n_rows: text rows in all.
        rows_per_pass: text rows of which `kept` is asked at once.
    """

    def __init__(self, rows: RowStream, kept: Kept, seq_len: int, batch_size: int, n_rows: int, rows_per_pass: int):
        self.rows, self.kept, self.rows_per_pass, self.n_rows = rows, kept, rows_per_pass, n_rows
        self.batch_size, self.rows_per_batch, self.n_batches_given = batch_size, batch_size // seq_len, 0
        self.n_rows_left, self.filling = 0, Filling()  # no batch is ready before it is asked for

    @property
    def n_batches(self) -> int:
        return math.ceil(self.n_rows / self.rows_per_batch)

    def close(self) -> None:
        """Close the text. The position is kept: iteration can continue."""
        self.rows.close()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict(), "given": self.n_batches_given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])
        self.n_batches_given = state["given"]

    def __iter__(self) -> "TextBatches":
        return self

    def __next__(self) -> TextBatch:
        stop_together()
        left = self.n_rows - self.n_batches_given * self.rows_per_batch
        tokens = self.rows.take(max(0, min(self.rows_per_batch, left)))
        tokens = tokens[data_axis().share(len(tokens))]
        if len(tokens) == 0:
            raise StopIteration
        keeps, xs = zip(*(self.kept(part) for part in tokens.split(self.rows_per_pass)), strict=True)
        self.n_batches_given += 1
        return TextBatch(tokens, torch.cat(keeps), torch.cat(xs))


def check_whole_rows(batch_size: int, n_tokens: int, seq_len: int, alike: bool) -> None:
    """Raise a SettingError unless batches are whole text rows, and ranks have equally many rows and positions.

    Args:
        alike: whether every text row has equally many positions.
    """
    if batch_size % seq_len:
        fits = seq_len * max(1, batch_size // seq_len)
        raise SettingError(
            f"{{batch_size}}={batch_size} is not a multiple of {{seq_len}}={seq_len}, but loss=kl_mse takes whole text "
            f"rows: give {{batch_size}}={fits}."
        )
    n = data_axis().size
    if n > 1 and (batch_size % (n * seq_len) or n_tokens % (n * seq_len)):
        raise SettingError(
            f"{{batch_size}}={batch_size} and {{n_tokens}}={n_tokens} must be multiples of {n * seq_len}: "
            f"loss=kl_mse takes whole text rows of {{seq_len}}={seq_len}, as many for each of {n} processes."
        )
    if n > 1 and not alike:
        raise SettingError(
            "{exclude_bos}, {exclude_tokens} and {max_norm} leave processes with different numbers of positions, "
            "and loss=kl_mse takes whole text rows: leave them out, or give trainer.devices=1."
        )
