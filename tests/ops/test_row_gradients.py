"""Gradients in parts: rows of dead latents beside factors over active entries."""

import pytest
import torch

from sae_lab.ops.row_gradients import SomeRows, add_rows, select_rows
from sae_lab.ops.sparse import RowGradient

F, D, M = 7, 5, 6


def factors(lengths, padding: int) -> RowGradient:
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths) + padding
    indices = torch.randint(M, (n,), generator=generator)
    indices[sum(lengths) :] = M  # as the rows of padding are numbered
    rows = torch.randn(M, D, generator=generator)
    return RowGradient(torch.tensor([0, *lengths]).cumsum(0), indices, torch.randn(n, generator=generator), rows, True)


@pytest.mark.parametrize("positions", [[], [0], [6], [2, 3, 5], [1, 6, 7, 7], [7, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("lengths", [[3, 0, 2, 1, 0, 4, 0], [0] * 7, [0, 0, 0, 9, 0, 0, 1]])
def test_rows_join_the_factors(lengths, padding, positions):
    gradient = factors(lengths, padding)
    positions = torch.tensor(positions, dtype=torch.long)
    part = SomeRows(positions, torch.randn(len(positions), D, generator=torch.Generator().manual_seed(1)))
    both = add_rows(gradient, part)
    assert both.offsets[-1] == sum(lengths) + (positions < F).sum()
    torch.testing.assert_close(both.to_dense(), gradient.to_dense() + part.to_dense(F))


def test_selected_rows_have_the_gradient_of_indexing():
    W = torch.nn.Parameter(torch.randn(F, D, dtype=torch.float64))
    positions, grad = torch.tensor([1, 4, 7, 7]), torch.randn(4, D, dtype=torch.float64)
    rows = select_rows(W, positions, W)
    assert torch.equal(rows[:2], W[positions[:2]])
    assert (rows[2:] == 0).all()
    (rows * grad).sum().backward()
    expected = torch.zeros(F, D, dtype=torch.float64).index_copy(0, positions[:2], grad[:2])
    assert torch.equal(W.grad, expected)


def test_a_parameter_that_collects_gets_the_rows_alone():
    W = torch.nn.Parameter(torch.randn(F, D))
    W.factors = []
    (2 * select_rows(W, torch.tensor([3]), W)).sum().backward()
    assert W.grad is None
    [part] = W.factors
    assert torch.equal(part.to_dense(F)[3], torch.full((D,), 2.0))
