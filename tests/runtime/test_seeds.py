"""Which numbers a seed leads to: runs continue with them, so they are the same for ever."""

import torch

from sae_lab.runtime.seeds import nth_generator


def test_the_numbers_stay_what_they_were():
    assert nth_generator(3, 5).initial_seed() == 3 * 1_000_003 + 5
    assert torch.randperm(8, generator=nth_generator(1, 2)).tolist() == [6, 1, 5, 3, 7, 0, 4, 2]


def test_no_two_are_alike():
    seeds = [nth_generator(seed, n).initial_seed() for seed in range(3) for n in (0, 1, 2, 10**6)]
    assert len(set(seeds)) == len(seeds)
