"""Rows of a token store in a random order over the whole text."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.text.permutation import permute
from sae_lab.text.rows import RowStream, raise_no_rows, warn_of_new_pass
from sae_lab.text.store import TokenStore


class StoredRows(RowStream):
    """A RowStream whose pass number `epoch` is the permutation of all rows of a store that (seed, epoch) draws.

    Args:
        open_store: returns the store. It is called when the first rows are taken.

    Raises:
        UserError: the store has no rows, or the next ones are damaged.
    """

    def __init__(self, open_store: Callable[[], TokenStore], seed: int, repeat: bool, pack: bool):
        self.open_store, self.seed, self.repeat, self.pack = open_store, seed, repeat, pack
        self.epoch = self.row = 0

    @cached_property
    def store(self) -> TokenStore:
        store = self.open_store()
        any_tokens = store.n_tokens > 0
        if len(store) == 0 and (self.repeat or not (self.pack and any_tokens)):
            raise_no_rows(store.seq_len, self.pack, any_tokens)
        return store

    def take(self, n: int) -> Int[Tensor, "r t"]:
        taken = [np.empty((0, self.store.seq_len), np.int64)]
        for epoch, numbers in self._advance(n):
            taken.append(self.store.read(permute(np.array(numbers), len(self.store), self.seed, epoch)))
        return torch.from_numpy(np.concatenate(taken, dtype=np.int64))

    def skip(self, n: int) -> int:
        return sum(len(numbers) for _, numbers in self._advance(n))

    def _advance(self, n: int) -> Iterator[tuple[int, range]]:
        """Go on by n rows, or to the end. Yields the rows of each pass on the way: its epoch, their numbers in it."""
        while n and (self.row < len(self.store) or self._next_pass()):
            numbers = range(self.row, min(self.row + n, len(self.store)))
            self.row, n = numbers.stop, n - len(numbers)
            yield self.epoch, numbers

    def _next_pass(self) -> bool:
        if self.repeat:
            self.epoch, self.row = self.epoch + 1, 0
            warn_of_new_pass(self.epoch)
        return self.repeat

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.row = state["epoch"], state["row"]

    def close(self) -> None:
        pass
