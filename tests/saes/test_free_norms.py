"""`sae.unit_norm=false` and `sae.l1_coefficient` of SAEs that select: norms move, and the penalty weighs by them."""

import pytest
import torch
from conftest import build, planted

RAW = ["sae.normalize=none", "sae.auxk_coefficient=0"]


def dense_loss(x: torch.Tensor, W_enc: torch.Tensor, W_dec: torch.Tensor, k: int, coefficient: float) -> torch.Tensor:
    """mean (x - x_hat)² + coefficient · mean_b Σ_i z_i |W_dec_i|, with b_dec = 0."""
    h = (x @ W_enc.T).relu()
    z = h * torch.zeros_like(h).scatter(1, h.topk(k, dim=1).indices, 1.0)
    return (x - z @ W_dec).square().mean() + coefficient * (z * W_dec.norm(dim=1)).sum(dim=1).mean()


def test_the_loss_and_its_gradients_are_the_formula():
    sae = build("topk", *RAW, "sae.l1_coefficient=0.1", "sae.unit_norm=false").double().train()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, sae.n_latents).view(-1, 1, 1))
    x = planted(32)[0].double()
    W_enc, W_dec = (W.detach()[:, 0].clone().requires_grad_() for W in (sae.W_enc, sae.W_dec))
    expected = dense_loss(x[:, 0], W_enc, W_dec, 4, 0.1)
    expected.backward()
    out = sae(x)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    torch.testing.assert_close(sae.W_enc.grad[:, 0], W_enc.grad)
    torch.testing.assert_close(sae.W_dec.grad[:, 0], W_dec.grad)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
@pytest.mark.parametrize("is_free", [True, False])
def test_only_free_norms_move(name, is_free):
    sae = build(name, *RAW, f"sae.unit_norm={str(not is_free).lower()}").train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for i in range(5):
        optimizer.zero_grad()
        sae(planted(64, seed=i)[0]).loss.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
    assert ((sae.W_dec.flatten(1).norm(dim=1) - 1).abs().max() > 1e-2) == is_free


def test_the_penalty_shrinks_activations_and_not_their_number():
    codes = {}
    for coefficient in (0.0, 0.3):
        sae = build("topk", *RAW, f"sae.l1_coefficient={coefficient}").train()
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for i in range(60):
            optimizer.zero_grad()
            sae(planted(128, seed=i)[0]).loss.backward()
            optimizer.step()
            sae.after_step()
        codes[coefficient] = sae.eval().encode(planted(128, seed=99)[0])
    assert codes[0.3].sum() < 0.9 * codes[0.0].sum()
    assert [(code > 0).sum(dim=1).max().item() for code in codes.values()] == [4, 4]
