"""Random numbers that a resumed run can draw again."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

AT_ONCE = 2**20
"""Numbers that are drawn at a time where they are thrown away."""


def nth_generator(seed: int, n: int) -> torch.Generator:
    """Return a new generator for the n-th block, pass or step of a run with this seed.

    It depends on (seed, n) alone, so a resumed run draws the same numbers and needs no state but n. Different seeds
    give different generators for n up to a million. Do not change the prime: existing checkpoints and caches rely on
    its numbers.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**64)


_draws = True


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Let `uniform_rows` return ones inside the block, where the weights are about to be read from a file."""
    global _draws
    before, _draws = _draws, False
    try:
        yield
    finally:
        _draws = before


def uniform_rows(n: int, own: range, shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    """Draw a tensor (n, *shape), uniform in ±bound, and return its rows `own`.

    The other rows are drawn as well, a few at a time, and thrown away: the numbers are those of the whole tensor, which
    is never in memory, and so are all that the generator draws afterwards.
    """
    if not _draws:
        return torch.ones(len(own), *shape)
    rows, size = torch.empty(len(own), *shape), math.prod(shape)
    skip(own.start * size, generator)
    rows.uniform_(-bound, bound, generator=generator)
    skip((n - own.stop) * size, generator)
    return rows


def skip(n: int, generator: torch.Generator) -> None:
    """Draw n uniform numbers and throw them away."""
    thrown_away = torch.empty(min(n, AT_ONCE))
    for start in range(0, n, AT_ONCE):
        thrown_away[: n - start].uniform_(generator=generator)
