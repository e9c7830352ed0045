"""Gated: its formula, and which gradient reaches what (docs/pitfalls.md: P-36 to P-38)."""

import pytest
import torch
from conftest import build, planted

X = planted(40, seed=1)[0]


@pytest.fixture
def sae():
    """Every parameter away from its initial zero."""
    sae = build("gated", "sae.normalize=none")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (sae.b_dec, sae.b_enc, sae.r_mag, sae.b_mag):
            parameter.normal_(std=0.3, generator=generator)
    return sae


def gradients(sae, term: str) -> dict[str, torch.Tensor | None]:
    sae.zero_grad()
    sae.losses(sae(X))[term].backward()
    return {name: parameter.grad for name, parameter in sae.named_parameters()}


def reference(sae, W_dec, b_dec):
    """(z, loss terms) written out, with the decoder of the gate's path given apart."""
    x = X[:, 0]
    u = (x - sae.b_dec[0]) @ sae.W_enc[:, 0].T
    gate = u + sae.b_enc
    z = (gate > 0).float() * (torch.exp(sae.r_mag) * u + sae.b_mag).relu()
    x_hat, x_gate = z @ sae.W_dec[:, 0] + sae.b_dec[0], gate.relu() @ W_dec[:, 0] + b_dec[0]
    return z, {
        "reconstruction": (x - x_hat).square().mean(),
        "sparsity": sae.l1_coefficient * gate.relu().sum(1).mean(),
        "gate": (x - x_gate).square().mean(),
    }


def test_code_losses_and_gradients_are_the_papers(sae):
    z, expected = reference(sae, sae.W_dec.detach().clone(), sae.b_dec.detach().clone())
    out = sae(X)
    torch.testing.assert_close(out.code, z)
    losses = sae.losses(out)
    assert losses.keys() == expected.keys()
    parameters = list(sae.parameters())
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])
        mine, theirs = (
            torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for terms in (losses, expected)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_gates_path_leaves_the_decoder_alone(sae):
    gradient = gradients(sae, "gate")
    assert gradient["W_dec"] is None
    assert gradient["r_mag"] is None
    assert gradient["W_enc"].norm() > 0


def test_the_gates_bias_learns_from_the_gates_terms_alone(sae):
    """P-36: the step blocks the main reconstruction; penalty and auxiliary reconstruction are what b_gate feels."""
    torch.testing.assert_close(gradients(sae, "reconstruction")["b_enc"], torch.zeros(64), rtol=0, atol=1e-6)
    assert gradients(sae, "gate")["b_enc"].norm() > 1e-3
    assert gradients(sae, "sparsity")["b_enc"].norm() > 1e-3


def test_magnitudes_feel_no_penalty(sae):
    gradient = gradients(sae, "sparsity")
    assert gradient["r_mag"] is None
    assert gradient["b_mag"] is None
    assert gradients(sae, "reconstruction")["b_mag"].norm() > 0


def test_dead_gates_can_be_revived_by_the_auxiliary_loss(sae):
    """P-38: here Gated has the auxiliary loss of the others, and it reaches the gate of the dead and nothing else."""
    sae.batches_since_fired[:20] = 100
    sae.zero_grad()
    sae.auxk_loss(sae(X)).backward()
    assert sae.dead()[:20].any()
    assert sae.b_enc.grad[sae.dead()].norm() > 0
    assert not sae.b_enc.grad[~sae.dead()].any()
