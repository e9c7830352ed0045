"""Pursuits against a plain float64 search row by row, and golden values computed by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sae_lab.evaluation.metrics import batch_fvu
from sae_lab.ops import pursuit
from sae_lab.ops.pursuit import METHODS, Dictionary, pursue
from sae_lab.ops.sparse import l0_per_row

D = torch.tensor([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]], dtype=torch.float64)
Y = torch.tensor([[1, 2, 0.5], [-1, 0.3, 2]], dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["gram", "products"])
def gram(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setitem(pursuit.GRAM_ENTRIES, "cpu", 0)
    return request.param


def problem(n: int = 40, f: int = 256, d: int = 32, active: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of 6 of 256 random directions, in float64."""
    generator = torch.Generator().manual_seed(0)
    dictionary = F.normalize(torch.randn(f, d, dtype=torch.float64, generator=generator), dim=1)
    chosen = torch.rand(n, f, generator=generator).topk(active, dim=1).indices
    strengths = 1 + torch.rand(n, active, dtype=torch.float64, generator=generator)
    return torch.zeros(n, f, dtype=torch.float64).scatter(1, chosen, strengths) @ dictionary, dictionary


def signed_reference(method: str, y: np.ndarray, D: np.ndarray, k: int) -> np.ndarray:
    """One row without the constraint w >= 0."""
    w = np.zeros(len(D))
    for _ in range(k):
        c = D @ (y - w @ D)
        j = np.abs(c).argmax()
        S = (w != 0) | (np.arange(len(D)) == j)
        if method == "matching_pursuit":
            w[j] += c[j]
        elif method == "gradient_pursuit":
            v = (c * S) @ D
            w = w + (c * S) * ((c * S) @ (c * S)) / (v @ v)
        else:
            w = np.zeros(len(D))
            w[S] = np.linalg.lstsq(D[S].T, y, rcond=None)[0]
    return w


def reference(method: str, y: np.ndarray, D: np.ndarray, k: int) -> np.ndarray:
    """One row, by the formulas of pursuit.py's docstring."""
    w = np.zeros(len(D))
    for _ in range(k):
        c = D @ (y - w @ D)
        j = c.argmax()
        S = (w > 0) | (np.arange(len(D)) == j)
        if method == "matching_pursuit":
            w[j] += max(c[j], 0)
        elif method == "gradient_pursuit":
            v = (c * S) @ D
            w = np.maximum(w + (c * S) * ((c * S) @ (c * S)) / (v @ v), 0)
        else:
            w = np.zeros(len(D))
            w[S] = np.linalg.lstsq(D[S].T, y, rcond=None)[0]
            while (w < 0).any():
                S = w > 0
                w = np.zeros(len(D))
                w[S] = np.linalg.lstsq(D[S].T, y, rcond=None)[0]
    return w


@pytest.mark.parametrize("method", METHODS)
def test_is_the_search_row_by_row(method, gram):
    y, dictionary = problem()
    code = pursue(method, y, Dictionary(dictionary), 12)
    expected = np.stack([reference(method, row, dictionary.numpy(), 12) for row in y.numpy()])
    np.testing.assert_allclose(code.to_dense().numpy(), expected, atol=1e-9)
    assert (code.values > 0).all()
    assert all((latents.diff() > 0).all() for latents in code.latents.split(code.row_offsets.diff().tolist()))


@pytest.mark.parametrize(
    ("k", "code", "errors"),
    [
        (1, [[0, 0, 2.2, 0], [0, 0, 0, 1.78]], [0.41, 1.9216]),
        (2, [[0, 0, 2.2, 0.544], [0, 0, 0, 1.78]], [0.114064, 1.9216]),
        (3, [[0, 0, 1.93888, 0.544], [0, 0, 0, 1.78]], [0.04588, 1.9216]),
    ],
)
def test_golden_b_gradient_pursuit(k, code, errors, gram):
    z = pursue("gradient_pursuit", Y, Dictionary(D), k).to_dense()
    np.testing.assert_allclose(z, np.array(code), atol=1e-9)
    np.testing.assert_allclose((Y - z @ D).square().sum(1), errors, atol=1e-6)


def test_orthogonal_matching_pursuit_ends_at_least_squares():
    z = pursue("orthogonal_matching_pursuit", Y, Dictionary(D), 3).to_dense()
    np.testing.assert_allclose(z[0], [0, 7 / 24, 5 / 3, 5 / 8], atol=1e-9)
    np.testing.assert_allclose(z[0] @ D, Y[0], atol=1e-9)


def test_each_method_spends_its_steps_better():
    """On 6-sparse codes: fvu falls from matching to gradient to orthogonal, and k bounds L0."""
    y, dictionary = problem(n=400)
    codes = [pursue(method, y, Dictionary(dictionary), 12) for method in METHODS]
    fvu = [batch_fvu(y, code.to_dense() @ dictionary).item() for code in codes]
    assert fvu == sorted(fvu, reverse=True)
    assert fvu[1] < 0.01  # on another draw: 0.0055, and 3.17 for the encoder below
    top = (y @ dictionary.T).topk(12, dim=1)
    tied = torch.zeros(400, 256, dtype=torch.float64).scatter(1, top.indices, top.values.relu())
    assert batch_fvu(y, tied @ dictionary) > 1
    assert all(l0_per_row(code).max() <= 12 for code in codes)


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_residual_stay_finite(method, gram):
    """P-57: a zero row, and a row that is reached before the steps are spent."""
    y = torch.stack([torch.zeros(3, dtype=torch.float64), 2 * D[2], -D.sum(0)])
    z = pursue(method, y, Dictionary(D), 4).to_dense()
    np.testing.assert_allclose(z, [[0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_makes_the_residual_larger(method):
    """Equal where no weight is clipped; here clipping does no harm either."""
    y, dictionary = problem()
    codes = [pursue(method, y, Dictionary(dictionary), k).to_dense() for k in range(1, 10)]
    errors = torch.stack([(y - code @ dictionary).square().sum(1) for code in codes])
    assert (errors.diff(dim=0) <= 1e-12).all()
    assert (errors[-1] < 0.1 * errors[0]).float().mean() > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_signed_search_is_that_without_the_constraint(method, gram):
    y, dictionary = problem()
    y[::2] *= -1
    code = pursue(method, y, Dictionary(dictionary), 12, signed=True).to_dense().numpy()
    expected = np.stack([signed_reference(method, row, dictionary.numpy(), 12) for row in y.numpy()])
    np.testing.assert_allclose(code, expected, atol=1e-9)
    assert (code < 0).sum() > 40


@pytest.mark.parametrize("method", METHODS)
def test_equal_latents_do_not_break_the_search(method):
    twice = torch.cat([D, D])
    z = pursue(method, Y, Dictionary(twice), 4).to_dense()
    once = pursue(method, Y, Dictionary(D), 4).to_dense()
    np.testing.assert_allclose(z @ twice, once @ D, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_of_a_row_decides_nothing(method, gram):
    """P-59: scaling a dictionary's rows scales the code back, and changes no choice."""
    y, dictionary = problem()
    scale = 0.1 + 10 * torch.rand(len(dictionary), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scaled = pursue(method, y, Dictionary(dictionary * scale), 8).to_dense()
    torch.testing.assert_close(scaled * scale.T, pursue(method, y, Dictionary(dictionary), 8).to_dense())


def test_pieces_of_rows_change_nothing(monkeypatch):
    y, dictionary = problem(n=1100)
    whole = [pursue("gradient_pursuit", rows, Dictionary(dictionary), 5).to_dense() for rows in (y[:600], y[600:])]
    monkeypatch.setitem(pursuit.PIECE, "cpu", 0)
    torch.testing.assert_close(pursue("gradient_pursuit", y, Dictionary(dictionary), 5).to_dense(), torch.cat(whole))
