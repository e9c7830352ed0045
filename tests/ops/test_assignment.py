"""The assignment is the best of all."""

from itertools import permutations

import numpy as np
import pytest

from sae_lab.ops.assignment import assign


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 6), (6, 3), (1, 5), (7, 7)])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_matching_has_a_larger_sum(shape, seed):
    scores = np.random.default_rng(seed).normal(size=shape).round(1)  # rounded: with ties
    rows, columns = assign(scores)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(set(columns.tolist())) == len(columns) == min(shape)
    long, short = (scores, shape[1]) if shape[0] >= shape[1] else (scores.T, shape[0])
    best = max(long[list(order), range(short)].sum() for order in permutations(range(len(long)), short))
    assert scores[rows, columns].sum() == pytest.approx(best)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (60, 300), (300, 60)])
def test_hidden_pairs_are_found(n, m):
    random = np.random.default_rng(0)
    order = random.permutation(max(n, m))[: min(n, m)]
    scores = random.uniform(0, 0.5, size=(n, m))
    for i, j in enumerate(order):
        scores[(i, j) if n <= m else (j, i)] = 0.9
    rows, columns = assign(scores)
    assert (scores[rows, columns] == 0.9).all()


def test_conflicts_are_resolved_for_the_sum_and_not_for_the_largest_entry():
    scores = np.array([[1.0, 0.9], [0.95, 0.0]])
    assert [i.tolist() for i in assign(scores)] == [[0, 1], [1, 0]]
