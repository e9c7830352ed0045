"""The keyed permutation: every number once, the same on every machine, another one for every key."""

import numpy as np
import pytest

from sae_lab.text.permutation import permute


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 4096, 70_001])
def test_every_number_comes_once(n):
    images = permute(np.arange(n), n, 5, 1)
    assert np.array_equal(np.sort(images), np.arange(n))


def test_golden_values():
    """Rows of runs that are resumed depend on them."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [6, 4, 0, 3, 9, 2, 1, 7, 8, 5]
    assert permute(np.arange(5), 10**9, 7, 2).tolist() == [669323430, 175303697, 693555414, 357735857, 20706660]


def test_a_part_is_that_of_the_whole():
    whole = permute(np.arange(1000), 1000, 3)
    assert np.array_equal(permute(np.arange(250, 300), 1000, 3), whole[250:300])


def test_keys_differ_and_neighbours_are_torn_apart():
    n = 20_000
    orders = [permute(np.arange(n), n, *key) for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1))]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(np.arange(n), a)[0, 1]) < 0.03
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03
        assert all(np.mean(a == b) < 0.001 for b in orders[i + 1 :])


def test_small_permutations_are_drawn_evenly():
    """Of three numbers: each of six orders about as often."""
    drawn = [tuple(permute(np.arange(3), 3, seed).tolist()) for seed in range(600)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 6
    assert min(counts) > 70
