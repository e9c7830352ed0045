"""Passes over numbered pieces of rows, each pass in a random order of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.runtime.seeds import nth_generator


class PiecePasses:
    """Iterator over groups of pieces, with the state from which each group can be given again.

    Pass number n visits the pieces in an order drawn from (seed, n), so that each block of a stream mixes rows from
    everywhere. The order takes 8 bytes of memory per piece.

    Args:
        pieces: the numbers of the pieces.
        at_once: pieces in a group.
        repeat: start a new pass after the last piece.
        on_new_pass: called with the number of the pass that starts, counted from 1.
    """

    def __init__(
        self,
        pieces: Int[Tensor, " n"],
        at_once: int,
        seed: int,
        repeat: bool,
        on_new_pass: Callable[[int], None] = lambda number: None,
    ):
        self.pieces, self.at_once, self.seed, self.repeat = pieces, max(1, at_once), seed, repeat
        self.on_new_pass = on_new_pass
        self.epoch = self.next_piece = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "piece": self.next_piece}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.next_piece = state["epoch"], state["piece"]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Int[Tensor, " m"]]]:
        while True:
            order = self.pieces[torch.randperm(len(self.pieces), generator=nth_generator(self.seed, self.epoch))]
            while self.next_piece < len(order):
                state, group = self.state_dict(), order[self.next_piece : self.next_piece + self.at_once]
                self.next_piece += len(group)
                yield state, group
            if not self.repeat:
                return
            self.epoch, self.next_piece = self.epoch + 1, 0
            self.on_new_pass(self.epoch + 1)
