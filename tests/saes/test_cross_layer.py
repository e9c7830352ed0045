"""Cross-layer transcoders: latents read their own layer and write to it and those after it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build, planted

from sae_lab.ops.sparse import l0_per_row
from sae_lab.parallel.mesh import only_latents
from sae_lab.runtime.errors import UserError
from sae_lab.saes.cross_layer import CrossLayer, CrossLayerTopKSAE
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.training.step import TrainingStep

SETTINGS = ("sae.encoder_bias=true", "sae.normalize=none")
CLASSES = {"topk": "CrossLayerTopKSAE", "batch_topk": "CrossLayerBatchTopKSAE", "jumprelu": "CrossLayerJumpReLUSAE"}
PART = 16  # latents a layer


def cross_layer(name: str, *overrides: str, n_layers: int = 3) -> CrossLayer:
    target = f"sae._target_=sae_lab.saes.cross_layer.{CLASSES[name]}"
    return build(name, target, *SETTINGS, *overrides, n_latents=PART * n_layers, n_sources=2 * n_layers)


def rows(n: int = 64, n_layers: int = 3) -> torch.Tensor:
    return 3 * planted(n, n_sources=2 * n_layers)[0]


def dense(sae: CrossLayer, x: torch.Tensor, mask: torch.Tensor, W_enc, W_dec, b_enc, b_dec) -> torch.Tensor:
    """y_hat, layer by layer and latent by latent."""
    h = torch.stack([x[:, i // PART] @ W_enc[i, 0] for i in range(len(W_enc))], dim=1) + b_enc
    z = h * mask
    y_hat = [sum(z[:, [i]] * W_dec[i, m] for i in range(PART * (m + 1))) + b_dec[m] for m in range(len(b_dec))]
    return torch.stack(y_hat, dim=1)


@pytest.fixture(params=CLASSES)
def name(request) -> str:
    return request.param


def test_shapes(name):
    sae, x = cross_layer(name), rows()
    out = sae(x)
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((48, 1, 16), (48, 3, 16))
    assert out.x_hat.shape == out.target.shape == (64, 3, 16)
    assert sae.eval().predict(x[:, :3]).shape == (64, 3, 16)
    assert torch.equal(sae.reconstruct(x)[:, :3], x[:, :3])


def test_values_and_gradients_are_those_of_the_formula(name):
    """In float64, to 1e-10, on a code with rows in which a layer has no active latent."""
    sae, x = cross_layer(name).double(), rows().double()
    out = sae(x)
    (out.target - out.x_hat).square().mean().backward()
    sae.W_dec.grad.masked_fill_(sae.layers.unwritten, 0)
    code = out.code if isinstance(out.code, torch.Tensor) else out.code.to_dense()
    assert name == "jumprelu" or (code.view(64, 3, PART).any(dim=2).sum(dim=1) < 3).any()
    parameters = [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
    y_hat = dense(sae, x, code != 0, *parameters)
    torch.testing.assert_close(out.x_hat, y_hat, rtol=0, atol=1e-12)
    (out.target - y_hat).square().mean().backward()
    for ours, theirs in zip((sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec), parameters, strict=True):
        assert theirs.grad.norm() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_a_latent_reads_its_own_layer_alone(name):
    sae, x = cross_layer(name), rows()
    sae(x)
    h = sae.pre_activations(x[:, :3])
    for layer in range(3):
        changed = x.clone()
        changed[:, layer] = -5
        same = (sae.pre_activations(changed[:, :3]) == h).all(dim=0)
        assert same.tolist() == [i // PART != layer for i in range(48)]


def test_nothing_is_written_backwards_however_long_it_trains(name):
    sae, x = cross_layer(name, "sae.dead_after=1"), rows()
    step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    losses = [step(x).terms["reconstruction"].item() for _ in range(60)]
    norms = sae.W_dec.detach().norm(dim=2).view(3, PART, 3)
    written = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    assert torch.equal(norms > 0, written.unsqueeze(1).expand(3, PART, 3))
    torch.testing.assert_close(sae.W_dec.detach().flatten(1).norm(dim=1), torch.ones(48))
    assert losses[-1] < 0.7 * losses[0]


def test_dead_latents_learn_from_their_own_layer():
    sae, x = cross_layer("topk", "sae.k_aux=48"), rows()
    out = sae(x)
    sae.batches_since_fired[::5] = 99
    dead = sae.dead().nonzero().squeeze(-1)
    assert len(dead) > 3
    mask = torch.zeros(64, 48).index_fill(1, dead, 1.0)
    W_enc, W_dec, b_enc = (p.detach() for p in (sae.W_enc, sae.W_dec, sae.b_enc))
    h = torch.stack([x[:, i // PART] @ W_enc[i, 0] for i in range(48)], dim=1) + b_enc
    e_hat = torch.einsum("bf,fsd->bsd", h.relu() * mask, W_dec)
    loss = sae.auxk_loss(out)
    torch.testing.assert_close(loss, ((out.target - out.x_hat) - e_hat).square().mean())
    loss.backward()
    assert sae.W_enc.grad[dead].any()
    assert not sae.W_enc.grad[mask[0] == 0].any()


def test_one_layer_is_a_transcoder():
    x = rows(n_layers=1)
    one = cross_layer("topk", n_layers=1)
    plain = build("topk", *SETTINGS, "sae.n_inputs=1", n_latents=PART, n_sources=2)
    losses = [torch.stack(list(sae.losses(sae(x)).values())).sum() for sae in (one, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(one.W_enc.grad, plain.W_enc.grad)
    torch.testing.assert_close(one.W_dec.grad, plain.W_dec.grad)


def test_a_feature_that_two_layers_write_is_one_latent():
    """24 features that layer 1 sees, written by both layers: found whole, without the second layer's latents."""
    x, directions = planted(8192, n_sources=3)
    x = torch.stack([x[:, 0], torch.zeros_like(x[:, 0]), x[:, 1], x[:, 2]], dim=1)
    sae = CrossLayerTopKSAE(
        k=3, d_in=16, n_latents=128, n_sources=4, normalize="none", encoder_bias=True, auxk_coefficient=1 / 32
    )
    step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    for epoch in range(12):
        for batch in x[torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))].split(256):
            step(batch)
    written = F.normalize(directions[:, 1:].flatten(1), dim=-1)
    cosine, latent = (written @ sae.directions().flatten(1).T).max(dim=1)
    assert (cosine > 0.9).float().mean() >= 0.9
    assert (latent[cosine > 0.9] < 64).all()


def test_eval_codes_and_folders(name, tmp_path):
    sae, x = cross_layer(name), rows()
    sae(x)
    loaded = load_sae_folder(save_sae(sae.eval(), tmp_path / "sae"))
    assert type(loaded) is type(sae)
    assert torch.equal(loaded.encode(x)[:5] != 0, sae.encode(x[:5, :3]) != 0)
    assert l0_per_row(loaded.encode(x)).sum() > 0
    assert torch.equal(loaded.layers.unwritten, sae.layers.unwritten)


OWN = [range(16, 48), range(18, 30), range(5, 20), range(10, 40)]


@pytest.mark.parametrize("own", OWN, ids=str)
def test_some_latents_read_the_sources_of_their_layers_alone(own, tmp_path):
    """Of one layer, of several and of parts of layers: saved together, read by themselves."""
    sae, x, here = cross_layer("jumprelu").eval(), rows()[:, :3], slice(own.start, own.stop)
    some = load_sae_folder(save_sae(sae, tmp_path / "sae"), latents=own)
    torch.testing.assert_close(some.encode(x), sae.encode(x)[:, here])
    assert torch.equal(some.layers.unwritten, sae.layers.unwritten[here])
    read = range(own.start // PART, (own.stop - 1) // PART + 1)
    assert some.encoder(x).inputs.shape == (64, len(read), 16)
    every = [
        s.layers.encoder_rows(s.W_enc, torch.arange(len(s.own_latents))).unflatten(1, (-1, 16)) for s in (some, sae)
    ]
    assert torch.equal(every[0], every[1][here, read.start : read.stop])
    with only_latents(own):
        drawn = cross_layer("jumprelu")
    assert torch.equal(drawn.W_dec, sae.W_dec[here])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_sources": 3}, "as many sites to predict as to read"),
        ({"n_inputs": 1}, "as many sites to predict as to read, not n_inputs=1 of 4"),
        ({"n_latents": 33}, "number of latents, 33, must be a multiple of the 2 layers"),
        ({"hidden": [8]}, "hidden does not apply to a cross-layer transcoder"),
        ({"skip": True}, "skip does not apply to a cross-layer transcoder"),
        ({"tied": True}, "of different sites"),
        ({"normalize": "per_token"}, "normalize=mean_norm"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        CrossLayerTopKSAE(**{"k": 2, "d_in": 16, "n_latents": 32, "n_sources": 4, "normalize": "none"} | settings)
