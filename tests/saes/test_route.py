"""RouteSAE: the router, what it hands to the inner SAE, and what comes back (docs/pitfalls.md: P-42 to P-46)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import build

from sae_lab.evaluation.metrics import ReconstructionMetrics
from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.saes import RouteSAE, TopKSAE, VanillaSAE
from sae_lab.saes.matryoshka import MatryoshkaSAE, NestedOutput

inner_topk = partial(TopKSAE, k=3, normalize="none")


def rows(n: int = 64, s: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, s, 16, generator=torch.Generator().manual_seed(seed)) * 4 + 1


def unit(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


def route(routing: str = "hard", aggre: str = "sum", s: int = 3, inner=inner_topk, **settings) -> RouteSAE:
    return RouteSAE(inner, d_in=16, n_latents=64, n_sources=s, aggre=aggre, routing=routing, **settings)


def probabilities(sae: RouteSAE, x: torch.Tensor) -> torch.Tensor:
    y = unit(x)
    pooled = y.sum(1) if sae.aggre == "sum" else y.mean(1)
    return (pooled @ sae.W_router.T).softmax(-1)


@pytest.mark.parametrize("aggre", ["sum", "mean"])
def test_the_routed_row_is_the_formula(aggre):
    x, row = rows(), torch.arange(64)
    for routing in ("hard", "soft"):
        sae = route(routing, aggre)
        r = probabilities(sae, x)
        best = r.argmax(-1)
        alone = unit(x)[row, best]
        mixed = (r.unsqueeze(-1) * unit(x)).sum(1)
        weight = r[row, best, None] if routing == "hard" else 1
        torch.testing.assert_close(sae(x).target[:, 0], weight * alone if routing == "hard" else mixed)
        torch.testing.assert_close(sae.eval()(x).target[:, 0], weight * alone)
        assert torch.equal(sae.predicted_mask(x), F.one_hot(best, 3).bool())


def test_x_hat_has_the_units_of_the_site_and_no_factor_r():
    """P-42: what is spliced is undo(decode(encode(r x)) / r), which is what training judged."""
    x, sae = rows(), route().eval()
    x_hat, covers = sae.reconstruct(x), sae.predicted_mask(x)
    assert torch.equal(x_hat[~covers], x[~covers])
    r = probabilities(sae, x)[covers].unsqueeze(-1)
    y, scale = unit(x)[covers], x.std(-1, keepdim=True)[covers]
    by_hand = sae.inner.decode(sae.inner.encode(r * y))[:, 0] / r
    torch.testing.assert_close(x_hat[covers], by_hand * scale + x.mean(-1, keepdim=True)[covers])


def test_a_perfect_inner_sae_gives_the_site_back():
    """P-42, in numbers: with 1 unit a dimension and its negative, the routed site's fvu is 0."""
    sae = route(inner=partial(TopKSAE, k=16, normalize="none")).eval()
    with torch.no_grad():
        sae.inner.W_dec[:32, 0] = sae.inner.W_enc[:32, 0] = torch.cat([torch.eye(16), -torch.eye(16)])
        sae.inner.W_enc[32:] = 0
    x, totals = rows(), ReconstructionMetrics(64)
    totals.update(x, *sae.autoencode(x), sae.predicted_mask(x))
    assert totals.compute()["fvu"] < 1e-10
    # Normalising divides by std + 1e-5, what undoes it multiplies by std.
    torch.testing.assert_close(sae.reconstruct(x), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_gradient_reaches_the_router(routing):
    sae = route(routing)
    sae.losses(sae(rows()))["reconstruction"].backward()
    assert sae.W_router.grad.norm() > 1e-4


def test_soft_is_hard_with_one_source():
    x, hard, soft = rows(s=1), route("hard", s=1), route("soft", s=1)
    torch.testing.assert_close(hard(x).target, soft(x).target)
    torch.testing.assert_close(hard(x).target, unit(x))
    torch.testing.assert_close(hard.reconstruct(x), TopKSAE(k=3, d_in=16, n_latents=64).reconstruct(x))


def test_a_permutation_of_the_sites_permutes_the_routing():
    x, sae, order = rows(), route(), torch.tensor([2, 0, 1])
    before, x_hat = sae.predicted_mask(x), sae.reconstruct(x)
    sae.W_router.data = sae.W_router.data[order]
    assert torch.equal(sae.predicted_mask(x[:, order]), before[:, order])
    torch.testing.assert_close(sae.reconstruct(x[:, order]), x_hat[:, order])


def test_the_router_cannot_lower_the_loss_by_its_weight():
    """P-45: the loss of rows all multiplied by one number is the same."""
    sae, x = route(), rows()
    out = sae(x)
    smaller = type(out)(0.1 * out.x, 0.1 * out.target, 0.1 * out.x_hat, out.code)
    torch.testing.assert_close(sae.losses(smaller)["reconstruction"], sae.losses(out)["reconstruction"])


def test_an_error_below_the_average_raises_the_weight_of_its_row():
    """What a hard router learns from: d loss / d log r_i is 2 r_i² (e_i² - loss · x_i²) / sum r² x²."""
    sae, x = route(), rows()
    row = torch.arange(64)
    sae.inner.b_dec.requires_grad_(False)
    r = sae.probabilities(unit(x)).detach().requires_grad_()
    weight = sae.site_weights(r)
    out = sae.inner((weight.unsqueeze(-1) * unit(x)).sum(1, keepdim=True))
    loss = sae.losses(out)["reconstruction"]
    (gradient,) = torch.autograd.grad(loss, r)
    best = r.argmax(-1)
    energy, error = (t.detach()[:, 0].square().sum(-1) for t in (out.target, out.target - out.x_hat))
    by_hand = 2 * (error - loss.detach() * energy) / energy.sum() / r[row, best]
    torch.testing.assert_close(gradient[row, best], by_hand.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_the_router_finds_the_site_and_the_dictionary_is_recovered(routing):
    """Features 8 i to 8 i + 7 live on site i; a row has three of one site's, and noise at the two other sites."""
    directions = F.normalize(torch.randn(24, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    sae = RouteSAE(inner_topk, d_in=32, n_latents=48, n_sources=3, routing=routing)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3, fused=True)
    for i in range(1001):
        generator = torch.Generator().manual_seed(i)
        site = torch.randint(3, (512,), generator=generator)
        features = torch.rand(512, 8, generator=generator).topk(3).indices + 8 * site.unsqueeze(-1)
        x = torch.randn(512, 3, 32, generator=generator)
        strengths = 1 + torch.rand(512, 3, 1, generator=generator)
        x[torch.arange(512), site] = (strengths * directions[features]).sum(1)
        torch.stack(list(sae.losses(sae(x)).values())).sum().backward()
        sae.before_step()
        adam.step()
        adam.zero_grad()
        sae.after_step()
    sae.eval()
    assert (sae.predicted_mask(x)[torch.arange(512), site]).float().mean() > 0.85
    centred = F.normalize(directions - directions.mean(-1, keepdim=True), dim=-1)  # as the normaliser leaves them
    assert (centred @ sae.inner.W_dec.detach()[:, 0].T).max(1).values.mean() > 0.95


def test_the_inner_sae_is_a_choice_of_the_command_line():
    sae = build("route", "sae@sae.inner=matryoshka", "sae.routing=soft", "sae.inner.group_sizes=[32,32]", n_sources=3)
    assert type(sae.inner) is MatryoshkaSAE
    assert sae.batch_rule
    out = sae(rows())
    assert isinstance(out, NestedOutput)
    assert isinstance(out.code, SparseCode)
    copy = RouteSAE.from_config(sae.config)
    assert copy.config == sae.config
    assert copy.inner.sizes == [32, 32]
    sae.calibrate(rows(), 0)
    assert sae.inner.threshold > 0
    assert not build("route").batch_rule


@pytest.mark.parametrize("inner", [inner_topk, partial(MatryoshkaSAE, k=3, normalize="none")], ids=["topk", "nested"])
def test_dead_latents_of_the_inner_sae_learn(inner):
    """P-44: the auxiliary loss is the inner SAE's, on the routed row."""
    sae = route(inner=inner)
    sae.inner.batches_since_fired[:20] = 100
    out = sae(rows())
    dead = sae.dead()
    assert dead.any()
    sae.losses(out)["auxk"].backward()
    assert sae.inner.W_enc.grad[dead].norm() > 0
    assert not sae.inner.W_enc.grad[~dead].any()


def test_any_inner_sae_trains():
    sae = route(inner=partial(VanillaSAE, normalize="none"))
    losses = sae.losses(sae(rows()))
    assert losses.keys() == {"reconstruction", "sparsity"}
    assert sae.dead() is not None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"aggre": "max"}, "choose sum or mean"),
        ({"routing": "firm"}, "choose hard or soft"),
        ({"inner": partial(TopKSAE, k=3)}, "give inner.normalize=none"),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        route(**settings)
