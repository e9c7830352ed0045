"""Batches of whole text rows, for losses that need what the language model makes of the activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.buffer import Filling
from sae_lab.activations.columns import Columns
from sae_lab.parallel.agreement import stop_together
from sae_lab.parallel.mesh import data_axis
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


class WholeBatches:
    """Iterable for Lightning over all n_batches batches of a stream of TextBatches.

    The length is defined because Lightning otherwise reads one batch ahead.
    """

    def __init__(self, stream: Any, n_batches: int):
        self.stream, self.n_batches = stream, n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[TextBatch]:
        while self.stream.n_batches_given < self.n_batches and (batch := next(self.stream, None)) is not None:
            yield batch


class TextBatches:
    """Iterator over batches of `rows_per_batch` text rows, in the order of the text. The last batch may be smaller.

    Takes the place of ShuffledBlocks: the rows of text are shuffled, but the positions of a row stay together. Each of
    n ranks takes its share of the text rows of every batch.

    Args:
        rows: the text.
        kept: returns a mask of the positions to keep, and the activations there.
        seq_len: tokens of a text row.
        rows_per_batch: text rows of a batch.
        n_rows: text rows in all.
    """

    def __init__(self, rows: RowStream, kept: Kept, seq_len: int, rows_per_batch: int, n_rows: int):
        self.rows, self.kept, self.rows_per_batch, self.n_rows = rows, kept, rows_per_batch, n_rows
        self.batch_size, self.n_batches_given = rows_per_batch * seq_len, 0
        self.n_rows_left, self.filling = 0, Filling()  # no batch is ready before it is asked for

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
        batch = TextBatch(tokens, *self.kept(tokens))
        self.n_batches_given += 1
        return batch
