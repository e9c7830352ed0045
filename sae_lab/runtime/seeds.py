"""Random numbers that can be drawn again in the middle of a run."""

import torch


def nth_generator(seed: int, n: int) -> torch.Generator:
    """The generator of the n-th block, pass or step that a seed decides, which none of those before it has touched.

    So a run that continues draws what it would have drawn, with no state but n. Up to n of a million no two seeds have
    a generator in common. The prime must stay: checkpoints and caches of old continue with its numbers.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + n)
