"""Where biases start: b_dec and b_enc at statistics of the first training batch."""

import numpy as np
import pytest
import torch
from conftest import SAE_NAMES, build, dictionary, planted
from test_contract import same, snapshot

from sae_lab.runtime.errors import UserError
from sae_lab.saes import JumpReLUSAE, TopKSAE
from sae_lab.saes.cross_layer import CrossLayerTopKSAE
from sae_lab.saes.parts.starts import geometric_median

LINEAR = [name for name in SAE_NAMES if hasattr(build(name), "W_enc")]


def rows(n: int = 200, n_sources: int = 1, seed: int = 0) -> torch.Tensor:
    return 3 * planted(n, n_sources=n_sources, seed=seed)[0] + 1


def test_the_geometric_median_has_the_least_mean_distance():
    """Its gradient, the mean of unit vectors to the rows, is zero; it is that of each source by itself."""
    x = rows(300, 2)
    x[:30] *= 100
    median = geometric_median(x)
    away = (x - median).numpy().astype(np.float64)
    np.testing.assert_allclose((away / np.linalg.norm(away, axis=-1, keepdims=True)).mean(0), 0, atol=1e-4)
    assert ((median - x[30:].mean(0)).norm(dim=-1) < 0.2 * (x.mean(0) - x[30:].mean(0)).norm(dim=-1)).all()


def test_the_geometric_median_of_equal_rows_is_that_row():
    x = torch.ones(5, 1, 3)
    assert torch.equal(geometric_median(x), x[0])


@pytest.mark.parametrize("normalize", ["none", "per_token", "mean_norm"])
@pytest.mark.parametrize("start", ["mean", "geometric_median"])
@pytest.mark.parametrize("name", SAE_NAMES)
def test_b_dec_starts_in_the_units_of_the_rows_that_it_is_for(name, start, normalize):
    """P-27. The first batch is the only one that counts."""
    key = "sae.inner" if name == "route" else "sae"
    sae = build(name, f"{key}.b_dec_init={start}", f"sae.normalize={normalize}", n_sources=2 if name == "route" else 1)
    target = sae(rows(n_sources=sae.n_sources)).target
    expected = target.mean(dim=0) if start == "mean" else geometric_median(target)
    torch.testing.assert_close(dictionary(sae).b_dec.detach(), expected.detach())
    known = dictionary(sae).b_dec.clone()
    sae(10 * rows(n_sources=sae.n_sources))
    assert torch.equal(dictionary(sae).b_dec, known)


def test_b_dec_of_a_transcoder_is_of_what_it_predicts():
    sae, x = (
        TopKSAE(k=4, d_in=16, n_latents=64, n_sources=3, n_inputs=1, normalize="none", b_dec_init="mean"),
        rows(9, 3),
    )
    sae(x)
    torch.testing.assert_close(sae.b_dec.detach(), x[:, 1:].mean(0))


@pytest.mark.parametrize("name", LINEAR)
def test_each_latent_starts_active_on_the_share_of_rows(name):
    sae = build(name, "sae.encoder_bias=true", "sae.b_enc_init=0.1", "sae.b_dec_init=mean")
    sae(rows())
    above = sae.pre_activations(sae.sources(rows())[0]) > sae.firing_level()
    torch.testing.assert_close(above.sum(dim=0), torch.full((64,), 20))


def test_each_latent_of_a_cross_layer_transcoder_is_counted_on_its_layer():
    settings = {"k": 4, "d_in": 16, "n_latents": 64, "n_sources": 4, "normalize": "none", "encoder_bias": True}
    sae, x = CrossLayerTopKSAE(**settings, b_enc_init=0.1), rows(n_sources=4)
    sae(x)
    torch.testing.assert_close((sae.pre_activations(x[:, :2]) > 0).sum(dim=0), torch.full((64,), 20))


@pytest.mark.parametrize("setting", [{"b_dec_init": "mean"}, {"b_enc_init": 0.1, "encoder_bias": True}], ids=str)
def test_weights_that_are_given_do_not_start_again(setting):
    settings = {"k": 4, "d_in": 16, "n_latents": 64, **setting}
    first, resumed, started = (JumpReLUSAE(**settings) for _ in range(3))
    first(rows())
    resumed.load_state_dict(first.state_dict())
    started.start_from(first)
    for sae in (resumed, started):
        before = snapshot(sae)
        sae(10 * rows(seed=1))
        after = snapshot(sae)
        assert all(torch.equal(before[name], after[name]) for name in ("b_dec", "b_enc"))


def test_evaluation_starts_nothing():
    sae = build("topk", "sae.b_dec_init=mean").eval()
    before = snapshot(sae)
    sae(rows())
    assert same(before, snapshot(sae))


def test_starts_without_a_bias_to_start_are_refused():
    with pytest.raises(UserError, match=r"b_enc_init=0\.1 needs a b_enc: give encoder_bias=true"):
        TopKSAE(k=2, d_in=2, n_latents=4, b_enc_init=0.1)
    with pytest.raises(UserError, match="b_dec_init=mean would change b_dec, which frozen_decoder=true forbids"):
        TopKSAE(k=2, d_in=2, n_latents=4, frozen_decoder=True, b_dec_init="mean")


def test_thresholds_start_after_the_biases():
    """JumpReLU's start gives L0 k on the first batch with the b_dec that the first batch gives."""
    sae = JumpReLUSAE(k=4, d_in=16, n_latents=64, theta=None, bandwidth=None, b_dec_init="mean")
    sae.resample(rows())
    assert (sae(rows()).code > 0).sum() == pytest.approx(4 * 200, abs=2)
