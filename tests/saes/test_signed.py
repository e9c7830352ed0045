"""Signed codes (AbsTopK): gradients, losses and thresholds against dense formulas, planted axes, and files."""

import pytest
import torch
from conftest import build, dictionary, planted

from sae_lab.ops import auxk
from sae_lab.ops.auxk import auxk_loss
from sae_lab.ops.sparse import fired_latents, l0_per_row
from sae_lab.saes.files import load_sae_folder, save_sae

X = planted(60, signed=True)[0]
SIGNED = {
    "abs_topk": ("abs_topk",),
    "abs_batch_topk": ("abs_batch_topk",),
    "running": ("abs_batch_topk", "sae.quantile=running"),
    "matryoshka": ("matryoshka", "sae.signed=true", "sae.group_sizes=[16,48]"),
    "route": ("route", "sae.inner.signed=true"),
    "pursuit": ("pursuit", "sae.signed=true"),
}


def largest(h: torch.Tensor, k: int, of_batch: bool) -> torch.Tensor:
    """h, with 0 in place of all but the k largest |h| of each row, or k·b of the batch."""
    flat = h.reshape(1, -1) if of_batch else h
    kept = flat.abs().topk(k * len(h) // len(flat), dim=1).indices
    return (torch.zeros_like(flat).scatter(1, kept, 1) * flat).view_as(h)


@pytest.mark.parametrize("name", ["abs_topk", "abs_batch_topk"])
def test_gradients_are_those_of_the_dense_formula(name):
    """In float64, with the auxiliary loss on some dead latents."""
    sae = build(name, "sae.normalize=none", "sae.encoder_bias=true", "sae.k_aux=3").double()
    dead = torch.arange(10, 30)
    sae.batches_since_fired[dead] = 99
    x = X.double()
    with torch.no_grad():
        sae.W_enc[dead] *= 1e-3  # so that they stay dead
        sae.b_dec += 0.1
        sae.b_enc += 0.05 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        sae.b_enc[dead] *= 1e-3
    weights = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]
    out = sae(x)
    loss = (out.target - out.x_hat).square().mean() + sae.auxk_coefficient * sae.auxk_loss(out)  # losses() is float32
    mine = torch.autograd.grad(loss, weights)
    h = (x - sae.b_dec)[:, 0] @ sae.W_enc[:, 0].T + sae.b_enc
    z = largest(h, 4, of_batch=sae.batch_rule)
    error = x[:, 0] - z @ sae.W_dec[:, 0] - sae.b_dec
    h_dead = ((x - sae.b_dec)[:, 0].detach() @ sae.W_enc[dead, 0].T) + sae.b_enc[dead]
    e_hat = largest(h_dead, 3, of_batch=False) @ sae.W_dec[dead, 0]
    dense = error.square().mean() + sae.auxk_coefficient * (error.detach() - e_hat).square().mean()
    torch.testing.assert_close(out.code.to_dense(), z, rtol=1e-10, atol=1e-12)
    assert (z < 0).sum() > 60
    torch.testing.assert_close(mine, torch.autograd.grad(dense, weights), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("over_batch", [False, True])
def test_both_forms_of_the_auxiliary_loss_agree(over_batch, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, e, W, V = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 40, 30, 30))
    results = []
    for sparse_from in (0, 10**6):
        monkeypatch.setitem(auxk.SPARSE_FROM, "cpu", sparse_from)
        own = W.clone().requires_grad_(), V.clone().requires_grad_()
        loss = auxk_loss(x, e, own[0], None, own[1], 3, over_batch, signed=True)
        results.append([loss, *torch.autograd.grad(loss, own)])
    z = largest(x @ W.T, 3, over_batch)
    torch.testing.assert_close(results[0][0], (e - z @ V).square().mean())
    torch.testing.assert_close(results[0], results[1])


def test_the_deployed_rule_is_a_threshold_of_absolute_values():
    sae = build("abs_batch_topk", "sae.normalize=none")
    for i in range(5):
        sae(planted(60, signed=True, seed=i)[0])
    for i in range(5):
        sae.calibrate(planted(60, signed=True, seed=i)[0], i)
    sae.eval()
    h = sae.pre_activations(X).detach()
    smallest = [
        sae.pre_activations(planted(60, signed=True, seed=i)[0]).detach().abs().flatten().topk(240).values[-1]
        for i in range(5)
    ]
    torch.testing.assert_close(sae.threshold, torch.stack(smallest).mean())
    torch.testing.assert_close(sae.encode(X), h * (h.abs() > sae.threshold))
    assert l0_per_row(sae.encode(X)).float().mean().item() == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("kind", SIGNED)
def test_negative_codes_count_and_outlive_files(kind, tmp_path):
    sae = build(*SIGNED[kind])
    sae.train()
    code = sae(X).code
    z = code.to_dense()
    assert (z < 0).any()
    assert sae.signed
    assert torch.equal(l0_per_row(code), (z != 0).sum(dim=1))
    assert torch.equal(fired_latents(code), (z != 0).any(dim=0))
    assert torch.equal(dictionary(sae).batches_since_fired == 0, (z != 0).any(dim=0))
    loaded = load_sae_folder(save_sae(sae, tmp_path, probe_rows=X))
    assert loaded.signed
    assert torch.equal(loaded.encode(X), sae.eval().encode(X))


def test_a_latent_stands_for_both_ends_of_an_axis():
    """x and -x have opposite codes where nothing is subtracted."""
    sae = build("abs_topk", "sae.normalize=none").eval()
    torch.testing.assert_close(sae.encode(-X), -sae.encode(X))
    assert (build("topk", "sae.normalize=none").eval().encode(X) >= 0).all()
