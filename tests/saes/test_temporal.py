"""Temporal SAEs: the contrast between a token and the token before it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build, planted

from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import MatryoshkaSAE, TemporalSAE

NOW, BEFORE = (planted(40, seed=seed)[0] + 0.1 for seed in (3, 4))
PAIRS = torch.cat([NOW, BEFORE], dim=1)


def temporal(**settings) -> TemporalSAE:
    sae = TemporalSAE(k=4, d_in=16, n_latents=64, auxk_coefficient=0.0, normalize="none", **settings)
    torch.nn.init.normal_(sae.b_dec, std=0.1, generator=torch.Generator().manual_seed(0))
    return sae


def dense_code(sae, x: torch.Tensor) -> torch.Tensor:
    h = ((x - sae.b_dec)[:, 0] @ sae.W_enc[:, 0].T).relu()
    return torch.where(h >= h.flatten().topk(4 * len(x)).values[-1], h, 0)


def test_loss_and_gradients_are_those_of_dense_codes():
    sae, pairs = temporal(group_sizes=[24, 40]).double(), PAIRS.double()
    mine = sae.losses(sae(pairs))["temporal"]
    a, p = (dense_code(sae, x)[:, :24] for x in pairs.split(1, dim=1))
    partner = torch.arange(40)
    expected = 0.2 * (F.cross_entropy(a @ p.T, partner) + F.cross_entropy(p @ a.T, partner)) / 2 / 16
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, [sae.W_enc, sae.b_dec]) for loss in (mine, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_all_but_the_contrast_is_matryoshkas_on_the_tokens_alone():
    sae = temporal()
    plain = sae.convert_to(MatryoshkaSAE, group_sizes=[12, 52])
    out, alone = sae(PAIRS), plain(NOW)
    assert torch.equal(out.code.to_dense(), alone.code.to_dense())
    assert torch.equal(sae.losses(out)["reconstruction"], plain.losses(alone)["reconstruction"])
    assert torch.equal(sae.threshold, plain.threshold)
    assert torch.equal(sae.batches_since_fired, plain.batches_since_fired)
    assert l0_per_row(out.previous).sum() == 4 * 40


def test_it_is_deployed_as_matryoshka():
    sae = temporal()
    sae(PAIRS)
    deployed = sae.eval().deployed()
    assert (type(deployed), deployed.group_sizes) == (MatryoshkaSAE, [12, 52])
    assert torch.equal(deployed.encode(NOW), sae.encode(NOW))


def test_a_coefficient_of_zero_leaves_the_term_out_and_a_route_is_refused():
    sae = temporal(temporal_coefficient=0.0)
    assert "temporal" not in sae.losses(sae(PAIRS))
    with pytest.raises(UserError, match="compares rows with those before, which a route does not pass on"):
        build("route", "sae@sae.inner=temporal", n_sources=2)


def pairs_of_one_topic(seed: int) -> torch.Tensor:
    """Two tokens of one topic, each with a word of its own: both are planted directions."""
    generator = torch.Generator().manual_seed(seed)
    topics, words = planted(1)[1].split(12)
    topic = topics[torch.randint(12, (64,), generator=generator)]
    return torch.cat([topic + words[torch.randint(12, (64,), generator=generator)] for _ in range(2)], dim=1)


def test_the_first_group_learns_what_neighbours_share():
    similar = []
    for coefficient in (0.0, 1.0):
        sae = TemporalSAE(
            k=4, d_in=16, n_latents=64, normalize="none", group_sizes=[16, 48], temporal_coefficient=coefficient
        )
        adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for seed in range(150):
            adam.zero_grad()
            torch.stack(list(sae.losses(sae(pairs_of_one_topic(seed))).values())).sum().backward()
            sae.before_step()
            adam.step()
            sae.after_step()
        now, before = (sae.encode(x)[:, :16] for x in pairs_of_one_topic(999).split(1, dim=1))
        similar.append(F.cosine_similarity(now, before).mean().item())
    assert similar[0] < 0.7
    assert similar[1] > 0.85
