"""Random numbers that a resumed run can draw again."""

import torch


def nth_generator(seed: int, n: int) -> torch.Generator:
    """Return a new generator for the n-th block, pass or step of a run with this seed.

    It depends on (seed, n) alone, so a resumed run draws the same numbers and needs no state but n. Different seeds
    give different generators for n up to a million. Do not change the prime: existing checkpoints and caches rely on
    its numbers.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**64)
