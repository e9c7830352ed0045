"""Hierarchical TopK: the loss over budgets, and another k after training."""

import pytest
import torch
from conftest import build, planted

from sae_lab.evaluation.rules import convert_activation
from sae_lab.ops.budgets import split_by_rank
from sae_lab.ops.fixed_size import fixed_size
from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, HierarchicalTopKSAE, TopKSAE
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.route import RouteSAE
from sae_lab.training.plans import Plans

X = planted(48, seed=3)[0] + 0.1


def hierarchical(k: int = 6, **settings) -> HierarchicalTopKSAE:
    sae = HierarchicalTopKSAE(k=k, d_in=16, n_latents=64, auxk_coefficient=0.0, normalize="none", **settings)
    torch.nn.init.normal_(sae.b_dec, std=0.1, generator=torch.Generator().manual_seed(0))
    return sae


def dense_levels(sae, x: torch.Tensor, budgets: list[int]) -> list[torch.Tensor]:
    """The paper's definition: the cumulative sums over the sorted code."""
    h = ((x - sae.b_dec)[:, 0] @ sae.W_enc[:, 0].T).relu()
    values, latents = h.topk(budgets[-1], dim=1)
    sums = (values.unsqueeze(-1) * sae.W_dec[latents, 0]).cumsum(dim=1) + sae.b_dec[0]
    return [sums[:, n - 1] for n in budgets]


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [(None, [1, 3, 6]), ("all", [1, 2, 3, 4, 5, 6]), ([5, 2], [2, 5, 6]), ([6], [6]), ([], [6])],
)
@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "fixed size"])
def test_loss_and_gradients_are_those_of_the_cumulative_sums(budgets, expected, fixed):
    sae, x = hierarchical(budgets=budgets).double(), X.double()
    Plans(sae).next()
    with fixed_size(fixed):
        out = sae(x)
        mine = sae.losses(out)["reconstruction"]
    levels = dense_levels(sae, x, expected)
    torch.testing.assert_close([level[:, 0] for level in out.levels[1:]], levels)
    torch.testing.assert_close(out.x_hat[:, 0], levels[-1])
    reference = torch.stack([(x[:, 0] - level).square().mean() for level in levels]).mean()
    torch.testing.assert_close(mine.double(), reference, rtol=1e-6, atol=0)  # the loss is in float32
    mine = torch.stack([(out.target - level).square().mean() for level in out.levels[1:]]).mean()
    parameters = [sae.W_enc, sae.W_dec, sae.b_dec]
    gradients = torch.autograd.grad(mine, parameters), torch.autograd.grad(reference, parameters)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_one_budget_is_topk():
    sae = hierarchical(budgets=[6])
    out, plain = sae(X), sae.convert_to(TopKSAE)(X)
    assert torch.equal(out.code.to_dense(), plain.code.to_dense())
    torch.testing.assert_close(out.x_hat, plain.x_hat)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_split_by_rank_and_ties_as_the_selection_breaks_them(padded):
    sae = hierarchical(k=3)
    h = torch.tensor([[0.5, 2.0, 2.0, 2.0, 0.1], [0.0, -1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    with fixed_size(padded):
        code = sae.select([h])
        parts = split_by_rank(code, torch.tensor([0, 1, 2]))
        firsts = [sae.with_k(n).select([h]).to_dense() for n in (1, 2, 3)]
    sums = parts.to_dense().view(3, 3, 5).cumsum(dim=1)
    assert all(torch.equal(sums[:, i], first) for i, first in enumerate(firsts))
    assert l0_per_row(parts).tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_a_k_chosen_after_training_gives_the_level_of_that_budget(k):
    sae = hierarchical(k=9, budgets=[3, 6])
    sae(X)
    other = sae.eval().with_k(k)
    assert (other.k, other.budgets, other.training) == (k, [n for n in (3, 6) if n <= k], False)
    torch.testing.assert_close(other.reconstruct(X)[:, 0], dense_levels(sae, X, [k])[0])
    assert (l0_per_row(other.encode(X)) <= k).all()
    assert sae.k == 9


def test_every_sae_takes_another_k_or_says_that_it_cannot(sae_name):
    sae = build(sae_name, n_sources=2 if sae_name == "route" else 1).eval()
    if type(sae).with_k is BaseSAE.with_k:
        with pytest.raises(UserError, match="cannot take k=2 after training: train it with that L0"):
            sae.with_k(2)
        return
    x = planted(64, n_sources=sae.n_sources)[0] + 0.1
    other = sae.with_k(2)
    other.calibrate(x, 0)
    assert l0_per_row(other.encode(x)).float().mean() == pytest.approx(2, abs=0.05)
    assert type(other) is type(sae)
    torch.testing.assert_close(dict(other.named_parameters()), dict(sae.named_parameters()))


def test_a_running_threshold_gives_way_to_one_of_the_new_k():
    sae = BatchTopKSAE(k=4, d_in=16, n_latents=64, quantile="running")
    sae(X)
    other = sae.with_k(2.5)
    other.calibrate(X, 0)
    assert l0_per_row(other.eval().encode(X)).float().mean() == pytest.approx(2.5, abs=0.05)


def test_it_is_deployed_as_topk_and_takes_other_rules():
    sae = hierarchical().eval()
    assert type(sae.deployed()) is TopKSAE
    assert torch.equal(sae.deployed().encode(X), sae.encode(X))
    assert type(convert_activation(sae, "batch_topk")) is BatchTopKSAE


def test_a_route_may_hold_it():
    sae = build("route", "sae@sae.inner=hierarchical_topk", n_sources=3)
    assert isinstance(sae, RouteSAE)
    terms = sae.losses(sae(planted(20, n_sources=3)[0]))
    assert terms["reconstruction"].isfinite()
    assert sae.with_k(2).inner.k == 2


@pytest.mark.parametrize(
    ("budgets", "sentence"),
    [
        ([4, 9], r"budgets=\[4, 9\] has 9, which is above k=6"),
        ([0, 2], "budgets=.* must be null, all, or a list of whole numbers"),
        ("some", "budgets=some must be null, all, or a list"),
    ],
)
def test_budgets_that_cannot_be_are_refused(budgets, sentence):
    with pytest.raises(UserError, match=sentence):
        hierarchical(budgets=budgets)
