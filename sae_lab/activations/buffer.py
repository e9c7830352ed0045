"""Shuffle consecutive rows into batches. Every row comes exactly once, and the position can be saved and restored."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.block import Block, Layout
from sae_lab.activations.cursor import Cursor, Place
from sae_lab.activations.source import Source
from sae_lab.parallel.agreement import stop_together
from sae_lab.parallel.mesh import world_size
from sae_lab.runtime.seeds import nth_generator
from sae_lab.runtime.signals import raise_if_stopped


class Prepare(Protocol):
    """Asks a source to compute rows ahead: `now` of them are wanted at once, up to `soon` before the block is used up.

    Both count the rows that the source has not handed over. Changes no row.
    """

    def __call__(self, now: int, soon: int) -> None: ...


def no_prefetch(now: int, soon: int) -> None:
    """Do nothing: the source computes a chunk when it is asked for it."""


class Filling:
    """Block-fill timing for progress bars. Does not affect rows; not checkpointed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.seconds_per_row = 0.0
        """Those of the last block. With prefetch, only the first block of a run fills as slowly as it is harvested."""
        self.watch: Callable[[int, int], None] | None = None
        """Called while a block fills, with the number of rows so far and the number of rows of a full block."""

    def add(self, rows: int, seconds: float) -> None:
        """Record that a block of so many rows was filled."""
        self.seconds += seconds
        self.seconds_per_row = seconds / max(1, rows)


class ShuffledBlocks:
    """Iterator over batches: fills a block with `block_rows` consecutive rows, shuffles it, yields it, and repeats.

    With several ranks, each holds and yields its share of every batch: of all rows of a block, 1/n of a data axis of n.

    Block number n is permuted by a generator seeded with (seed, n), so the batches are a function of (source, seed).
    At the end of the source, the last batch may be smaller. All blocks reuse the same memory.

    A stop (SafeStop) is raised where a batch is asked for, or between two chunks of a block that is being filled. The
    state is then that after the last batch.

    The state is where the block begins (the state of the chunk with its first row, and the number of earlier rows in
    that chunk), the number of the block, and how many of its batches were given.

    Args:
        source: where the rows come from.
        block_rows: rows that are shuffled together, rounded down to whole batches.
        batch_size: rows in a batch.
        seed: seed of the permutations.
        n_rows: rows that the run takes. The batch with the last one ends there, and no block after it is prepared.
            None: there is no end.
        prepare: tells the source which of the rows that it has not handed over yet are wanted; see Prepare.
        device: where the block lies; None: where the first rows do.
    """

    def __init__(
        self,
        source: Source,
        block_rows: int,
        batch_size: int,
        seed: int,
        n_rows: int | None = None,
        prepare: Prepare = no_prefetch,
        device: torch.device | None = None,
    ):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.n_rows, self.prepare = n_rows, prepare
        self.block_rows = max(1, block_rows // batch_size) * batch_size
        self._begin: Place = (source.state_dict(), 0)
        self._number = self._given = 0
        self.filling, self._block, self._cursor = Filling(), Block(device), Cursor(source)
        self.close()

    def close(self) -> None:
        """Close the source and free the block. The position is kept: iteration can continue."""
        self._cursor.go_to(self._begin)
        self._filled_at = 0  # batches that were given of the block before it was filled
        self._is_filled = False
        self._block.close()

    @property
    def n_batches(self) -> int:
        """Batches of the run."""
        assert self.n_rows is not None
        return math.ceil(self.n_rows / self.batch_size)

    @property
    def n_batches_given(self) -> int:
        """Batches given since the beginning of the stream, including those before a resume.

        All of them have full size, except perhaps the last one of the last block.
        """
        return self._number * (self.block_rows // self.batch_size) + self._given

    @property
    def n_rows_left(self) -> int:
        """Rows left in the current block, counted in batches of full size."""
        return max(0, self._block.n_batches - self._given) * self._is_filled * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        chunk, skip = self._begin
        return {"chunk": chunk, "skip": skip, "block": self._number, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin = (state["chunk"], state["skip"])
        self._number, self._given = state["block"], state["given"]
        self.close()

    def __iter__(self) -> "ShuffledBlocks":
        return self

    def __next__(self) -> Float[Tensor, "b s d"]:
        stop_together()
        if not self._is_filled:
            self._refill()
        self._prepare_next_block()
        batch = self._block.batch(self._given)
        self._given += 1
        if self._given == self._block.n_batches:
            self._begin, self._number, self._given = self._cursor.place, self._number + 1, 0
            self._is_filled = False
        if len(batch) == 0:  # fewer rows than ranks
            raise StopIteration
        return batch

    def _refill(self) -> None:
        """Fill the block from the source and draw its permutation; raise StopIteration at the end of the source."""
        filled, start = 0, time.perf_counter()
        expected = self._layout(self.block_rows)
        self._block.begin(expected)
        while filled < self.block_rows and self._cursor.find_row():
            if filled == 0:
                self._begin = self._cursor.place
            rows = self._cursor.take(self.block_rows - filled)
            self._block.put(rows, self._cursor.chunk.rank)
            filled += len(rows)
            self._prepare_this_block(self.block_rows - filled)
            if self.filling.watch is not None:
                self.filling.watch(filled, self.block_rows)
            raise_if_stopped()
        self.filling.add(filled, time.perf_counter() - start)
        if filled == 0:
            raise StopIteration
        self._block.finish(expected if filled == self.block_rows else self._layout(filled))
        self._is_filled, self._filled_at = True, self._given

    def _layout(self, n: int) -> Layout:
        """Return which of the n rows of the current block each rank trains on."""
        order = torch.randperm(n, generator=nth_generator(self.seed, self._number))
        n_wanted = None if self.n_rows is None else self.n_rows - self._number * self.block_rows
        return Layout(order, self.batch_size, n_wanted)

    def _prepare_this_block(self, missing: int) -> None:
        """While the block is filled, let each rank compute two chunks while one is copied."""
        wanted = max(0, missing - self._cursor.n_left)
        self.prepare(min(wanted, 2 * world_size() * len(self._cursor.chunk.rows)), wanted)

    def _prepare_next_block(self) -> None:
        """Ask for the share of the next block that is due, so that it fills evenly over the batches of this one."""
        is_last = self.n_rows is not None and (self._number + 1) * self.block_rows >= self.n_rows
        wanted = 0 if is_last else max(0, self.block_rows - self._cursor.n_left)
        batch, n_batches = self._given + 1 - self._filled_at, self._block.n_batches - self._filled_at
        self.prepare(wanted * batch // n_batches, wanted)
