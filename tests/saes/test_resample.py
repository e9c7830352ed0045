"""Dead latents that are given new directions."""

import pytest
import torch
from conftest import SAE_NAMES, build, planted

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.seeds import nth_generator
from sae_lab.saes.parts.resample import draw_badly_reconstructed
from sae_lab.saes.vanilla import VanillaSAE

RESAMPLED = [name for name in SAE_NAMES if "resample_every" in build(name).config]
X = planted(64)[0] + 0.1


def test_rows_are_drawn_by_their_squared_loss_and_never_twice():
    loss = torch.tensor([1.0, 2.0, 0.0, 3.0])
    first = (
        torch.stack([draw_badly_reconstructed(loss, 1, nth_generator(seed, 0))[0] for seed in range(4000)]).bincount(
            minlength=4
        )
        / 4000
    )
    torch.testing.assert_close(first, torch.tensor([1, 4, 0, 9]) / 14, rtol=0, atol=0.03)
    assert sorted(draw_badly_reconstructed(loss, 4, nth_generator(0, 0)).tolist()) == [0, 1, 2, 3]
    assert torch.equal(*(draw_badly_reconstructed(loss, 3, nth_generator(5, 0)) for _ in range(2)))


def due(name: str, *overrides: str):
    """An SAE whose first nine latents are dead and that is about to see the batch before which it resamples."""
    sae = build(name, "sae.resample_every=10", *overrides)
    for p in sae.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    sae.after_step()
    sae.batches_since_fired[:9] = 100
    sae.steps.fill_(20)
    return sae


@pytest.mark.parametrize("name", RESAMPLED)
def test_dead_latents_take_the_direction_of_a_row_and_the_others_stay(name):
    sae = due(name, "sae.hidden=[8]")
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    rewritten = sae.resample(X)
    target = sae.sources.normalizer(X)[0] - sae.b_dec.detach()
    cosines = sae.W_dec[:9, 0].detach() @ (target / target.norm(dim=2, keepdim=True))[:, 0].T
    torch.testing.assert_close(cosines.max(dim=1).values, torch.ones(9))
    assert len(cosines.argmax(dim=1).unique()) == 9
    length = 0.2 * before["W_enc"][9:].flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc[:9].detach(), length * sae.W_dec[:9].detach())
    assert not sae.b_enc[:9].any()
    assert not sae.mlp.W_out[:9].any()
    assert not sae.dead()[:9].any()
    for key, tensor in sae.state_dict().items():
        changed = (tensor != before[key]).nonzero()
        assert key in (
            "W_enc",
            "W_dec",
            "b_enc",
            "batches_since_fired",
            "mlp.W_out",
            "r_mag",
            "b_mag",
            "thresholds",
        ) or (len(changed) == 0)
        assert len(changed) == 0 or changed[:, 0].max() < 9
    named = {id(p): n for n, p in sae.named_parameters()}
    touched = {key for key, tensor in sae.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {named[id(p)] for p, _ in rewritten} == touched - {"batches_since_fired"}
    assert all(rows.tolist() == list(range(9)) for _, rows in rewritten)


@pytest.mark.parametrize("name", RESAMPLED)
def test_a_resampled_latent_fires_on_its_row(name):
    sae = due(name)
    sae.resample(X)
    assert (sae.encode(X)[:, :9] != 0).any(dim=0).sum() >= 8


@pytest.mark.parametrize(("steps", "due_now"), [(0, False), (10, True), (15, False), (20, True)])
def test_it_happens_every_so_many_batches(steps, due_now):
    sae = due("vanilla")
    sae.steps.fill_(steps)
    assert bool(sae.resample(X)) == due_now
    assert due("vanilla", "sae.resample_every=0").resample(X) == []


def test_more_dead_latents_than_rows_wait_for_the_next_time():
    sae = due("vanilla")
    sae.resample(X[:5])
    assert sae.dead().sum() == 4


def test_it_revives_what_stays_dead_without_it():
    def dead_at_the_end(resample_every: int) -> int:
        sae = VanillaSAE(d_in=16, n_latents=64, normalize="none", resample_every=resample_every, l1_coefficient=0.01)
        with torch.no_grad():
            sae.b_enc[:40] = -10.0
        adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for i in range(200):
            x = planted(128, seed=i)[0]
            for parameter, rows in sae.resample(x):
                for moment in ("exp_avg", "exp_avg_sq"):
                    adam.state[parameter][moment][rows] = 0
            adam.zero_grad()
            torch.stack(list(sae.losses(sae(x)).values())).sum().backward()
            adam.step()
            sae.after_step()
        return int(sae.dead().sum())

    assert dead_at_the_end(0) >= 40
    assert dead_at_the_end(50) < 10


def test_a_frozen_decoder_cannot_be_resampled():
    with pytest.raises(UserError, match="choose one of them"):
        VanillaSAE(d_in=2, n_latents=4, resample_every=3, frozen_decoder=True)
