"""Transcoders: any SAE with a linear encoder, reading some sources and predicting the others."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SAE_NAMES, build, planted

from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import PursuitSAE, TopKSAE, VanillaSAE
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.saes.linear import LinearSAE
from sae_lab.training.step import TrainingStep

LINEAR = [name for name in SAE_NAMES if isinstance(build(name), LinearSAE)]
SETTINGS = ("sae.n_inputs=1", "sae.skip=true", "sae.normalize=mean_norm", "sae.encoder_bias=true")


def transcoder(name: str, *overrides: str, n_sources: int = 3) -> LinearSAE:
    """One source is read, two are predicted; a skip connection that is not zero."""
    sae = build(name, *SETTINGS, *overrides, n_sources=n_sources)
    with torch.no_grad():
        sae.W_skip.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        sae.b_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    return sae


def rows(n: int = 64, n_sources: int = 3) -> torch.Tensor:
    return 10 * planted(n, n_sources=n_sources)[0] + 0.1


@pytest.fixture(params=LINEAR)
def name(request) -> str:
    return request.param


def test_every_linear_sae_takes_part():
    assert {"topk", "batch_topk", "matryoshka", "jumprelu", "gated", "vanilla"} <= set(LINEAR)


def test_what_is_read_and_what_is_predicted(name):
    sae, x = transcoder(name), rows()
    out = sae(x)
    assert out.x.shape == (64, 1, 16)
    assert out.target.shape == out.x_hat.shape == (64, 2, 16)
    assert sae.directions().shape == (64, 2, 16)
    sae.eval()
    x_hat, code = sae.autoencode(x)
    assert torch.equal(x_hat[:, 0], x[:, 0])
    assert torch.equal(x_hat[:, 1:], sae.predict(x[:, :1]))
    assert torch.equal(sae.predicted_mask(x), torch.tensor([False, True, True]).expand(64, -1))
    for inputs in (x[:, :1], x[:, 0]):
        assert torch.equal(sae.encode(inputs), sae.encode(x))
    assert l0_per_row(code).sum() > 0


def test_the_prediction_does_not_look_at_what_it_predicts(name):
    sae, x = transcoder(name), rows()
    sae(x)
    sae.eval()
    changed = x.clone()
    changed[:, 1:] = -7
    assert torch.equal(sae.reconstruct(x)[:, 1:], sae.reconstruct(changed)[:, 1:])


def test_the_formula_in_raw_units(name):
    """y_hat = s_y (z W_dec + b_dec + (x / s_x) W_skip), the scales being the mean norms of the first batch."""
    sae, x = transcoder(name), rows()
    sae(x)
    sae.eval()
    scale = x.norm(dim=-1).mean(dim=0) / 4  # / sqrt(d)
    y = sae.encode(x) @ sae.W_dec.flatten(1) + sae.b_dec.flatten() + x[:, 0] / scale[0] @ sae.W_skip.T
    torch.testing.assert_close(sae.predict(x[:, :1]), y.view(64, 2, 16) * scale[1:, None])


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_gradients_are_those_of_the_dense_formula(name):
    """In float64, to 1e-10; each level of a Matryoshka has the skip connection."""
    sae, x = transcoder(name).double(), rows().double()
    out = sae(x)
    out_levels = out.levels[1:] if name == "matryoshka" else [out.x_hat]
    loss = torch.stack([(out.target - level).square().mean() for level in out_levels]).mean()  # mse() is in float32
    found = torch.autograd.grad(loss, list(sae.parameters()))
    W_enc, W_dec, b_enc, b_dec, W_skip = (
        p.detach().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.W_skip)
    )
    h = out.x.flatten(1) @ W_enc.flatten(1).T + b_enc
    z = h * (out.code.to_dense() > 0)
    ends = torch.tensor(sae.sizes).cumsum(0) if name == "matryoshka" else [64]
    levels = [
        (z[:, :end] @ W_dec[:end].flatten(1) + out.x.flatten(1) @ W_skip.T).view(64, 2, 16) + b_dec for end in ends
    ]
    for level, x_hat in zip(levels, out_levels, strict=True):
        torch.testing.assert_close(level, x_hat, rtol=0, atol=1e-12)
    dense = torch.stack([(out.target - level).square().mean() for level in levels]).mean()
    by_name = dict(zip([n for n, _ in sae.named_parameters()], found, strict=True))
    wanted = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "W_skip": W_skip}
    for key, gradient in zip(wanted, torch.autograd.grad(dense, list(wanted.values())), strict=True):
        assert gradient.norm() > 0
        torch.testing.assert_close(by_name[key], gradient, rtol=0, atol=1e-10)


def test_the_auxiliary_loss_reads_the_input_and_explains_the_target():
    sae, x = transcoder("topk", "sae.k_aux=64"), rows()
    sae(x)
    sae.batches_since_fired[:10] = 99
    out = sae(x)
    dead = sae.dead()
    assert dead.sum() > 0
    z = (out.x.flatten(1) @ sae.W_enc.flatten(1).T + sae.b_enc).relu() * dead
    e_hat = (z @ sae.W_dec.flatten(1)).view(64, 2, 16)
    torch.testing.assert_close(sae.auxk_loss(out), ((out.target - out.x_hat) - e_hat).square().mean())


def test_it_finds_planted_pairs_of_directions():
    """y = sum z_i b_i where x = sum z_i a_i: latents write the b_i, and read what tells the a_i apart."""
    x, directions = planted(8192, n_sources=2)
    sae = build("topk", "k=3", "sae.n_inputs=1", "sae.encoder_bias=true", "sae.normalize=none", n_sources=2)
    step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    for epoch in range(12):
        for batch in x[torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))].split(256):
            step(batch)
    written = F.normalize(directions[:, 1], dim=-1)
    cosine = (written @ sae.directions()[:, 0].T).amax(dim=1)
    assert (cosine > 0.9).float().mean() >= 0.9


def test_a_skip_connection_learns_what_is_linear():
    """y = A x: without the skip connection one latent a row has to do."""
    generator = torch.Generator().manual_seed(0)
    x, A = torch.randn(4096, 16, generator=generator), torch.randn(16, 16, generator=generator) / 4
    both = torch.stack([x, x @ A.T], dim=1)
    errors = {}
    for skip in (False, True):
        sae = TopKSAE(k=1, d_in=16, n_latents=64, n_sources=2, n_inputs=1, skip=skip, normalize="none")
        step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
        for batch in both.split(256) * 20:
            step(batch)
        y_hat = sae.eval().predict(x)[:, 0].detach()
        errors[skip] = float((y_hat - both[:, 1]).square().sum() / both[:, 1].square().sum())
    assert errors[True] < 0.01 < 0.4 < errors[False]


def test_resampling_points_each_side_at_its_own_sources():
    sae = transcoder("vanilla", "sae.resample_every=2", "sae.auxk_coefficient=0")
    x = rows()
    sae.train()
    sae(x)
    sae(x)
    sae.batches_since_fired[:4] = 99
    changed = sae.resample(x)
    assert {id(p) for p, _ in changed} >= {id(sae.W_enc), id(sae.W_dec), id(sae.b_enc)}
    read, target = sae.sources(sae.as_rows(x))
    towards_x = F.normalize(sae.W_enc[:4].flatten(1), dim=1) @ F.normalize(read.flatten(1), dim=1).T
    towards_y = sae.W_dec[:4].flatten(1) @ F.normalize((target - sae.b_dec).flatten(1), dim=1).T
    assert torch.equal(towards_x.argmax(dim=1), towards_y.argmax(dim=1))
    torch.testing.assert_close(towards_x.amax(dim=1), torch.ones(4))
    torch.testing.assert_close(towards_y.amax(dim=1), torch.ones(4))


def test_a_folder_brings_back_the_transcoder(name, tmp_path):
    sae, x = transcoder(name), rows()
    sae(x)
    loaded = load_sae_folder(save_sae(sae, tmp_path / "sae"))
    assert loaded.config == sae.config
    assert torch.equal(loaded.predict(x[:, 0]), sae.eval().predict(x[:, 0]))


def test_encoder_and_decoder_start_apart():
    """No direction of one site says anything of the other; an SAE starts with the two alike."""
    sae = build("topk", *SETTINGS, n_sources=2)
    cosine = F.cosine_similarity(sae.W_enc.flatten(1), sae.W_dec.flatten(1), dim=1)
    assert cosine.abs().mean() < 0.3
    torch.testing.assert_close(
        F.cosine_similarity(*(W.flatten(1) for W in (build("topk").W_enc, build("topk").W_dec)), dim=1), torch.ones(64)
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_inputs": 2, "n_sources": 2}, "leaves none to predict"),
        ({"n_inputs": 1}, "leaves none to predict"),
        ({"n_inputs": 1, "n_sources": 2, "normalize": "per_token"}, "normalize=mean_norm"),
        ({"n_inputs": 1, "n_sources": 2, "normalize": "constant_norm"}, "normalize=mean_norm"),
        ({"n_inputs": 1, "n_sources": 2, "tied": True, "normalize": "none"}, "of different sites"),
        ({"skip": True}, "skip=true is only for transcoders"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        VanillaSAE(d_in=16, n_latents=64, **settings)


def test_a_pursuit_has_nothing_to_read():
    with pytest.raises(UserError, match="n_inputs"):
        PursuitSAE(k=2, d_in=16, n_latents=64, n_sources=2, n_inputs=1, normalize="none")
    with pytest.raises(UserError, match="n_inputs"):
        PursuitSAE.of(transcoder("topk"), "matching_pursuit")


def test_an_sae_does_not_start_from_a_transcoder():
    other = build("topk", "sae.n_inputs=1", "sae.normalize=none", n_sources=3)
    with pytest.raises(UserError, match="n_inputs=1"):
        build("topk", "sae.normalize=none", n_sources=3).start_from(other)


def test_a_wrong_shape_is_told():
    with pytest.raises(UserError, match=r"\(..., 3, 16\)"):
        transcoder("topk").encode(torch.zeros(4, 2, 16))
