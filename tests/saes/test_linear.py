"""Tied weights and frozen decoders."""

import pytest
import torch
from conftest import build, planted

from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, TopKSAE
from sae_lab.saes.cross_layer import CrossLayerTopKSAE
from sae_lab.saes.files import load_sae_folder, save_sae

X = planted(64)[0] + 0.1


def train(sae, n_steps: int = 3, lr: float = 1e-2) -> None:
    adam = torch.optim.Adam(sae.parameters(), lr=lr)
    for i in range(n_steps):
        torch.stack(list(sae.losses(sae(planted(128, seed=i)[0])).values())).sum().backward()
        sae.before_step()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        sae.after_step()


@pytest.mark.parametrize("name", ["topk", "vanilla"])
class TestTied:
    def test_there_is_one_matrix_with_unit_rows_and_it_stays_one(self, name, tmp_path):
        sae = build(name, "sae.tied=true")
        train(sae)
        loaded = load_sae_folder(save_sae(sae, tmp_path))
        for each in (sae, sae.to("cpu", torch.float64).float(), loaded):
            assert each.W_enc is each.W_dec
            assert sum(p.numel() for p in each.parameters() if p.ndim == 3) == 64 * 16
        torch.testing.assert_close(sae.W_enc.flatten(1).norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
        assert torch.equal(loaded.encode(X), sae.eval().encode(X))

    def test_its_gradient_is_the_sum_of_both_without_the_part_along_each_row(self, name):
        tied, untied = build(name, "sae.tied=true"), build(name)
        with torch.no_grad():
            for W in (untied.W_enc, untied.W_dec):
                W.copy_(tied.W_dec)
        for sae in (tied, untied):
            torch.stack(list(sae.losses(sae(X)).values())).sum().backward()
        both, u = untied.W_enc.grad + untied.W_dec.grad, tied.W_dec.detach()
        torch.testing.assert_close(tied.W_enc.grad, both)
        tied.before_step()
        expected = both - (both * u).sum((1, 2), keepdim=True) * u
        torch.testing.assert_close(tied.W_enc.grad, expected, rtol=1e-4, atol=1e-7)

    def test_a_tied_sae_starts_an_untied_one_but_not_the_other_way_round(self, name):
        tied, untied = build(name, "sae.tied=true"), build(name, "seed=1")
        untied.start_from(tied)
        assert torch.equal(untied.eval().encode(X), tied.eval().encode(X))
        with pytest.raises(UserError, match="cannot start from an SAE with different W_enc and W_dec: give tied=false"):
            tied.start_from(untied)


@pytest.mark.parametrize("name", ["topk", "vanilla", "matryoshka"])
def test_a_frozen_decoder_stands_still_to_the_bit_whatever_its_norms(name):
    sae = build(name, "sae.frozen_decoder=true")
    with torch.no_grad():
        sae.W_dec.mul_(1.7)
        sae.b_dec.fill_(0.1)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    train(sae)
    assert torch.equal(sae.W_dec, before["W_dec"])
    assert torch.equal(sae.b_dec, before["b_dec"])
    assert not torch.equal(sae.W_enc, before["W_enc"])


@pytest.mark.parametrize("name", ["topk", "vanilla"])
def test_the_encoder_of_a_frozen_decoder_learns_as_it_would_beside_any_decoder(name):
    frozen, free = build(name, "sae.frozen_decoder=true"), build(name)
    for sae in (frozen, free):
        torch.stack(list(sae.losses(sae(X)).values())).sum().backward()
    assert torch.equal(frozen.W_enc.grad, free.W_enc.grad)
    assert frozen.W_dec.grad is None
    assert frozen.b_dec.grad is None


def test_dead_latents_of_a_frozen_dictionary_learn_to_encode():
    sae = build("topk", "sae.frozen_decoder=true")
    sae.batches_since_fired[:20] = 100
    sae.auxk_loss(sae.eval()(X)).backward()
    assert sae.W_enc.grad[:20].norm() > 0
    assert not sae.W_enc.grad[20:].any()


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="leaves nothing to train"):
        TopKSAE(k=2, d_in=2, n_latents=4, tied=True, frozen_decoder=True)


def rows_of(sae) -> torch.Tensor:
    return sae.W_enc.detach().flatten(1)


SHAPES = {
    "sae": {},
    "crosscoder": {"n_sources": 3},
    "transcoder": {"n_sources": 3, "n_inputs": 2, "normalize": "none"},
    "cross_layer": {"cls": CrossLayerTopKSAE, "n_sources": 4, "normalize": "none"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("encoder_norm", "norm"), [("unit", 1.0), (1, 1.0), (0.3, 0.3)])
def test_encoder_rows_start_with_the_norm_that_is_asked_for(shape, encoder_norm, norm):
    """Over all sources that a latent reads. Their directions, and all of W_dec, are those without the setting."""
    settings = {"k": 2, "d_in": 16, "n_latents": 64, **SHAPES[shape]}
    cls = settings.pop("cls", TopKSAE)
    sae, drawn = cls(**settings, encoder_norm=encoder_norm), cls(**settings)
    torch.testing.assert_close(rows_of(sae).norm(dim=1), torch.full((64,), norm))
    torch.testing.assert_close(rows_of(sae), rows_of(drawn) / rows_of(drawn).norm(dim=1, keepdim=True) * norm)
    assert torch.equal(sae.W_dec, drawn.W_dec)


def test_drawn_encoder_rows_have_the_documented_norm_and_spread():
    norms = rows_of(TopKSAE(k=2, d_in=128, n_latents=4096)).norm(dim=1)
    assert norms.mean() == pytest.approx((2 * 128 / 4096) ** 0.5, rel=0.01)
    assert norms.std() / norms.mean() == pytest.approx((0.2 / 128) ** 0.5, rel=0.05)


def test_unit_encoder_rows_are_those_of_the_decoder_and_train_away_from_them():
    sae = BatchTopKSAE(k=4, d_in=16, n_latents=64, encoder_norm="unit")
    assert torch.equal(sae.W_enc, sae.W_dec)
    train(sae)
    assert not torch.allclose(rows_of(sae).norm(dim=1), torch.ones(64), atol=1e-4)


def test_tied_weights_have_the_decoders_norm_only():
    assert TopKSAE(k=2, d_in=2, n_latents=4, tied=True, encoder_norm="unit").W_enc.norm(dim=-1).allclose(torch.ones(4))
    with pytest.raises(UserError, match=r"encoder_norm=0\.5 is impossible with tied=true"):
        TopKSAE(k=2, d_in=2, n_latents=4, tied=True, encoder_norm=0.5)
