"""Rows of a token store in a random order over the whole text."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.text.permutation import permute
from sae_lab.text.rows import raise_no_rows, warn_of_new_pass
from sae_lab.text.store import TokenStore


class StoredRows:
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
        while n and (self.row < len(self.store) or self._next_pass()):
            numbers = np.arange(self.row, min(self.row + n, len(self.store)))
            taken.append(self.store.read(permute(numbers, len(self.store), self.seed, self.epoch)))
            self.row, n = self.row + len(numbers), n - len(numbers)
        return torch.from_numpy(np.concatenate(taken, dtype=np.int64))

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
