"""Dictionaries that are searched in: an SAE's own, against its encoder, and one that learns from the codes found."""

import pytest
import torch
from conftest import SAE_NAMES, build, planted

from sae_lab.evaluation.metrics import batch_fvu
from sae_lab.ops.pursuit import METHODS
from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import LinearSAE, PursuitSAE

X = planted(64)[0] + 0.1
WITH_ENCODER = [name for name in SAE_NAMES if isinstance(build(name), LinearSAE)]


def train(sae, n_steps: int) -> list[float]:
    """The error of each batch before its step."""
    adam, errors = torch.optim.Adam(sae.train().parameters(), lr=3e-3), []
    for i in range(n_steps):
        out = sae(planted(256, seed=i)[0])
        adam.zero_grad()
        sae.losses(out)["reconstruction"].backward()
        sae.before_step()
        adam.step()
        sae.after_step()
        errors.append(batch_fvu(out.target, out.x_hat).item())
    return errors


@pytest.mark.parametrize("n_sources", [1, 3])
@pytest.mark.parametrize("name", WITH_ENCODER)
def test_beats_the_encoder_of_an_untrained_sae(name, n_sources):
    """The same dictionary, normalisation and b_dec, and a smaller error."""
    sae = build(name, n_sources=n_sources).eval()
    x = 5 * planted(50, n_sources=n_sources)[0] + 1
    found = PursuitSAE.of(sae, "orthogonal_matching_pursuit", k=4)
    torch.testing.assert_close(found.directions(), sae.directions())
    assert l0_per_row(found.encode(x)).max() <= 4
    errors = [(x - y).square().sum() for y in (found.reconstruct(x), sae.reconstruct(x))]
    assert errors[0] < errors[1]


def test_rows_of_any_norm_are_searched_as_unit_rows():
    sae = build("topk", "sae.frozen_decoder=true", "sae.encoder_bias=true", "sae.hidden=[8]").eval()
    expected = PursuitSAE.of(sae, "gradient_pursuit").encode(X)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 64).view(-1, 1, 1))
    torch.testing.assert_close(PursuitSAE.of(sae, "gradient_pursuit").encode(X), expected)
    assert expected.any()


@pytest.mark.parametrize("method", METHODS)
def test_b_dec_is_taken_off_first(method):
    """A row that is b_dec and two of one latent has that code."""
    sae = build("topk", "sae.normalize=none")
    torch.nn.init.normal_(sae.b_dec, generator=torch.Generator().manual_seed(0))
    x_hat, code = PursuitSAE.of(sae, method, 3).autoencode(x := (sae.b_dec + 2 * sae.W_dec[[3, 7]]).detach())
    torch.testing.assert_close(code.to_dense(), 2 * torch.eye(64)[[3, 7]], rtol=0, atol=1e-4)
    torch.testing.assert_close(x_hat, x)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_the_error_with_the_codes_held_still(method):
    sae = build("pursuit", f"sae.method={method}")
    out = sae(X)
    assert not out.code.values.requires_grad
    sae.losses(out)["reconstruction"].backward()
    W_dec, b_dec = (p.detach().clone().requires_grad_() for p in (sae.W_dec, sae.b_dec))
    z = out.code.to_dense()
    x_hat = (z @ W_dec.flatten(1)).view_as(out.target) + b_dec
    (out.target - x_hat).square().mean().backward()
    torch.testing.assert_close(sae.W_dec.grad, W_dec.grad)
    torch.testing.assert_close(sae.b_dec.grad, b_dec.grad)


def test_at_least_squares_codes_that_is_the_whole_gradient():
    """A central difference of the error along the constraint, codes searched for again on either side, in float64."""
    sae, x = build("pursuit", "sae.normalize=none").double(), X.double()
    direction = torch.randn(64, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        direction -= (direction * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec

    def error() -> torch.Tensor:
        out = sae(x)
        return (out.target - out.x_hat).square().mean()

    error().backward()
    errors = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            sae.W_dec += step * direction
        errors.append(error().item())
    slope = (errors[0] - errors[1]) / 2e-6
    assert slope == pytest.approx((sae.W_dec.grad * direction).sum().item(), rel=1e-5)


def test_a_dictionary_learns_from_its_codes_where_it_started_from():
    """From an SAE that has learnt for 300 batches: the error falls below that SAE's, and below the search in it."""
    sae = build("topk", "k=3", "sae.normalize=none", n_latents=48)
    train(sae, 300)
    x = planted(512, seed=10_000)[0]
    found = PursuitSAE.of(sae.eval(), "gradient_pursuit")
    before = batch_fvu(x, found.reconstruct(x)).item()
    assert before < batch_fvu(x, sae.reconstruct(x)).item()
    train(found, 300)
    assert batch_fvu(x, found.eval().reconstruct(x)).item() < 0.5 * before


def test_mistakes_get_one_sentence():
    for case, sentence in [
        (
            lambda: PursuitSAE(k=4, d_in=16, n_latents=64, method="newton"),
            "method=newton is not known: choose matching_pursuit, gradient_pursuit or orth",
        ),
        (
            lambda: PursuitSAE(k=65, d_in=16, n_latents=64),
            r"k=65 must be a whole number from 1 to the dictionary's 64 latents",
        ),
        (lambda: PursuitSAE(k=1.5, d_in=16, n_latents=64), r"k=1\.5 must be a whole number"),
        (lambda: PursuitSAE.of(build("vanilla"), "matching_pursuit"), r"no k of its own: give pursuit\.k="),
        (lambda: PursuitSAE.of(build("route"), "matching_pursuit", 4), "RouteSAE has no W_dec of its own to search in"),
        (lambda: build("pursuit").start_from(build("topk", n_latents=48)), "n_latents=48 cannot start one with"),
        (lambda: build("pursuit").start_from(build("topk", "sae.normalize=none")), "need sae.normalize=none here"),
    ]:
        with pytest.raises(UserError, match=sentence):
            case()
