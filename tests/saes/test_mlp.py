"""MLP encoders: they start as the SAE they are given, and then encode its dictionary better."""

import pytest
import torch
from conftest import SAE_NAMES, build, planted

from sae_lab.evaluation.metrics import batch_fvu
from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BaseSAE, BatchTopKSAE, TopKSAE
from sae_lab.saes.files import load_sae_folder, save_sae

X = planted(64)[0] + 0.1


def with_mlp(sae: BaseSAE, **settings) -> BaseSAE:
    """The same SAE, given an MLP."""
    return sae.convert_to(type(sae), **({"hidden": [24, 12]} | settings))


def stir(sae: BaseSAE) -> None:
    """A last layer that is not zero any more."""
    torch.nn.init.normal_(sae.mlp.W_out, std=0.1, generator=torch.Generator().manual_seed(1))


def train(sae: BaseSAE, n_steps: int, lr: float = 3e-3) -> None:
    sae.train()
    adam = torch.optim.Adam(sae.parameters(), lr=lr)
    for i in range(n_steps):
        adam.zero_grad()
        torch.stack(list(sae.losses(sae(planted(256, seed=i)[0])).values())).sum().backward()
        sae.before_step()
        adam.step()
        sae.after_step()


@pytest.mark.parametrize("name", [name for name in SAE_NAMES if hasattr(build(name), "hidden")])
@pytest.mark.parametrize("n_sources", [1, 3])
def test_at_step_0_it_is_the_sae_that_it_started_from(name, n_sources):
    sae, x = build(name, n_sources=n_sources), planted(64, n_sources=n_sources)[0] + 0.1
    for _ in range(3):
        sae(x)
    mlp = with_mlp(sae)
    for training in (False, True):
        sae.train(training)
        mlp.train(training)
        torch.testing.assert_close(mlp.reconstruct(x), sae.reconstruct(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(mlp.encode(x), sae.encode(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "vanilla"])
@pytest.mark.parametrize("encoder_bias", [False, True])
def test_gradients_of_every_parameter_are_those_of_a_dense_float64_encoder(name, encoder_bias):
    sae = with_mlp(build(name, f"sae.encoder_bias={encoder_bias}", "sae.normalize=none")).double()
    stir(sae)
    torch.nn.init.normal_(sae.b_dec, std=0.1, generator=torch.Generator().manual_seed(0))
    x = X.double()
    out = sae(x)
    a = centred = (x - sae.b_dec)[:, 0]
    for V, c in zip(sae.mlp.V, sae.mlp.c, strict=True):
        a = (a @ V.T + c).relu()
    h = centred @ sae.W_enc[:, 0].T + a @ sae.mlp.W_out.T + (0 if sae.b_enc is None else sae.b_enc)
    active = out.code.to_dense() if not isinstance(out.code, torch.Tensor) else out.code
    z = h * (active != 0)
    torch.testing.assert_close(active, z, rtol=1e-9, atol=1e-12)
    x_hat = z @ sae.W_dec[:, 0] + sae.b_dec[0]
    parameters = list(sae.parameters())
    mine, dense = (torch.autograd.grad((y * x).sum(), parameters) for y in (out.x_hat, x_hat.unsqueeze(1)))
    torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-11)
    assert all(g.any() for g in mine)


def test_the_auxiliary_loss_reaches_the_dead_latents_rows_and_no_hidden_layer():
    sae = with_mlp(build("topk"))
    stir(sae)
    sae.batches_since_fired[:20] = 100
    sae.auxk_loss(sae.eval()(X)).backward()
    for rows in (sae.W_enc.grad, sae.W_dec.grad, sae.mlp.W_out.grad):
        assert rows[:20].any()
        assert not rows[20:].any()
    assert all(V.grad is None or not V.grad.any() for V in sae.mlp.V)


def test_it_is_saved_loaded_and_taken_to_another_rule(tmp_path):
    sae = with_mlp(build("batch_topk"))
    train(sae, 3)
    loaded = load_sae_folder(save_sae(sae, tmp_path))
    assert loaded.config["hidden"] == [24, 12]
    assert torch.equal(loaded.encode(X), sae.eval().encode(X))
    row_wise = sae.convert_to(TopKSAE)
    assert set(l0_per_row(row_wise.encode(X)).tolist()) == {4}
    with pytest.raises(UserError, match=r"parameter mlp.W_out \(64, 12\) of a BatchTopKSAE does not fit"):
        build("batch_topk").start_from(sae)


def test_weights_come_from_the_seed_alone():
    one, same, other = (TopKSAE(k=4, d_in=16, n_latents=64, hidden=[24], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.mlp.V[0], same.mlp.V[0])
    assert not torch.equal(one.mlp.V[0], other.mlp.V[0])
    assert torch.equal(one.W_enc, TopKSAE(k=4, d_in=16, n_latents=64).W_enc)


@pytest.mark.parametrize("hidden", [[0], [12, -1], [1.5], 512, "wide"])
def test_layers_without_units_are_refused(hidden):
    with pytest.raises(UserError, match=r"must be a list of positive widths"):
        TopKSAE(k=2, d_in=2, n_latents=4, hidden=hidden)


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_it_beats_the_linear_encoder_of_the_same_dictionary_at_the_same_l0(cls):
    """24 features in 16 dimensions interfere: a linear encoder cannot tell all of them apart, an MLP nearly can."""
    linear = cls(k=3, d_in=16, n_latents=32, normalize="none")
    train(linear, 1000)
    mlp = with_mlp(linear, hidden=[128], frozen_decoder=True)
    train(mlp, 250)
    assert torch.equal(mlp.W_dec, linear.W_dec)
    x = planted(4096, seed=10_000)[0]
    fvu = [batch_fvu(x, sae.reconstruct(x)).item() for sae in (linear.train(), mlp)]
    l0 = [l0_per_row(sae(x).code).float().mean().item() for sae in (linear, mlp)]
    assert l0 == pytest.approx([3, 3], abs=0.01)
    assert fvu[1] < 0.75 * fvu[0], fvu
