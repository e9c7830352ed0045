"""What all generators of planted features have: directions, a forest of features, and rows by their numbers."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.runtime.seeds import nth_generator

BLOCK = 256
"""Rows that are drawn together. A batch size that is a multiple of it draws nothing twice."""


class Rows(NamedTuple):
    """Synthetic activations, the site of each row's features, and the strength of each feature; 0: not active."""

    x: Float[Tensor, "b s d"]
    site: Int[Tensor, " b"]
    strengths: Float[Tensor, "b n"]


class PlantedRows(ABC):
    """Rows with n known features. A row depends on (seed of the rows, its number) alone, whatever the batches.

    The features are on `device`, and so are the rows. A GPU draws other rows from a seed than a CPU.
    """

    d_in: int
    n_sites: int
    seed: int
    device: str

    @property
    @abstractmethod
    def directions(self) -> Float[Tensor, "n d"]:
        """The features' unit vectors."""

    @property
    @abstractmethod
    def parents(self) -> Int[Tensor, " n"]:
        """Each feature's parent, without which it is never active; -1: it has none."""

    @property
    @abstractmethod
    def levels(self) -> dict[str, slice]:
        """Names of groups of features. `roots` and `children` are among them, of which either may be empty."""

    @property
    def home(self) -> Int[Tensor, " n"]:
        """Site of each feature."""
        return torch.zeros(len(self.directions), dtype=torch.long, device=self.device)

    @abstractmethod
    def rows(self, n: int, generator: torch.Generator) -> Rows:
        """Draw n rows."""

    def rows_at(self, start: int, n: int, seed: int) -> Rows:
        """Return the rows start, ..., start + n - 1 of a seed."""
        blocks = range(start // BLOCK, -(-(start + n) // BLOCK))
        drawn = [self.rows(BLOCK, self.generator(seed, block)) for block in blocks]
        first = start - blocks.start * BLOCK
        return Rows(*(torch.cat(parts)[first : first + n] for parts in zip(*drawn, strict=True)))

    def generator(self, seed: int, block: int) -> torch.Generator:
        """Return the generator of a block of rows, on the device of the features."""
        numbers = nth_generator(seed, block)
        return numbers if self.device == "cpu" else torch.Generator(self.device).manual_seed(numbers.initial_seed())

    @cached_property
    def children(self) -> Int[Tensor, " edges"]:
        """The features that have a parent."""
        return (self.parents >= 0).nonzero().flatten()
