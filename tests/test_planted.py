"""The planted rows are what they say, and the recovery counts what is there."""

import json

import pytest
import torch
from shell import run

from sae_lab.saes.topk import TopKSAE
from sae_lab.studies.planted_features import PlantedFeatures
from sae_lab.studies.recovery import recovery

TREES = PlantedFeatures(d_in=32, n_trees=8, n_children=2, active=2.0, noise=0.0)


def rows(planted: PlantedFeatures, n: int = 20_000):
    return planted.rows(n, torch.Generator().manual_seed(3))


def test_directions_are_unit_and_unchanged_by_normalising():
    directions = TREES.directions
    assert directions.shape == (24, 32)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(24))
    torch.testing.assert_close(directions.mean(dim=-1), torch.zeros(24), atol=1e-6, rtol=0)


def test_a_child_is_active_only_with_its_root_and_the_mean_is_as_asked():
    planted = PlantedFeatures(d_in=64, n_trees=8, n_children=2, active=2.0, noise=0.0)
    x = rows(planted).x
    strengths = x[:, 0] @ torch.linalg.pinv(planted.directions)  # 24 features in 64 dimensions: a row tells them apart
    active = strengths > 0.5
    assert strengths[active].min() >= 1 - 1e-4
    assert strengths[active].max() <= 2 + 1e-4
    root, children = active[:, :8], active[:, 8:].view(-1, 8, 2)
    torch.testing.assert_close(strengths * active, rows(planted).strengths, atol=1e-3, rtol=0)
    assert not (children.any(dim=-1) & ~root).any()
    assert children.sum(dim=-1).max() == 1
    assert active.sum(dim=-1).float().mean() == pytest.approx(2.0, abs=0.05)
    assert (children.any(dim=-1).sum() / root.sum()).item() == pytest.approx(2 / 3, abs=0.02)


def test_features_stand_at_their_site_and_noise_at_the_others():
    planted = PlantedFeatures(d_in=32, n_trees=6, n_children=1, active=2.0, n_sites=3, noise=0.0)
    x, site, _ = rows(planted, 3000)
    assert planted.home.tolist() == [0, 1, 2, 0, 1, 2] * 2
    for s in range(3):
        here = x[site == s, s]
        span = planted.directions[planted.home == s]
        torch.testing.assert_close(here @ torch.linalg.pinv(span) @ span, here, atol=1e-4, rtol=0)
        assert x[site != s, s].std().item() == pytest.approx(1, abs=0.02)


def test_recovery_of_a_dictionary_that_has_all_roots_and_half_of_the_children():
    sae = TopKSAE(k=2, d_in=32, n_latents=32, normalize="none")
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[:8, 0] = TREES.directions[:8]
        sae.W_dec[24:32, 0] = TREES.directions[8:16]
    figures = recovery(sae, TREES, n_rows=256).figures
    assert figures["found_roots"] == 1
    assert figures["mmcs_roots"] == pytest.approx(1)
    assert figures["found_children"] == 0.5
    assert figures["found"] == pytest.approx(16 / 24)
    assert figures["place_roots"] == pytest.approx(3.5 / 32)
    assert figures["place_children"] == pytest.approx(27.5 / 32)
    assert "routed" not in figures


@pytest.mark.process
def test_the_command_recovers_what_it_planted(tmp_path):
    overrides = ["sae=topk", "planted.n_trees=24", "planted.n_children=0", "planted.active=3", "planted.d_in=32"]
    overrides += ["n_latents=48", "n_steps=600", "batch_size=256", "optimizer.lr=3e-3", f"hydra.run.dir={tmp_path}"]
    done = run(*overrides, module="planted")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "planted.json").read_text())
    assert figures["mmcs"] > 0.95
    assert figures["found"] > 0.9
    assert figures["config"]["planted"]["n_trees"] == 24


@pytest.mark.process
def test_what_is_not_found_has_no_place(tmp_path):
    done = run(f"hydra.run.dir={tmp_path}", "n_steps=1", "n_latents=16", "k=2", module="planted")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "planted.json").read_text(), parse_constant=pytest.fail)
    assert figures["found"] == 0
    assert "place_roots" not in figures


@pytest.mark.process
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["planted.n_trees=0"], "planted.n_trees=0 must be a whole number of at least 1."),
        (
            ["planted.active=1000"],
            "planted.active=1000 exceeds 112, what the trees of a site have on average where all are active: lower it, "
            "or raise planted.n_trees.",
        ),
        (["n_latents=4"], "planted.active=6 is more than n_latents=4: change one of them."),
        (["optimizer.lr=0"], "optimizer.lr=0 must be a number above 0, or auto."),
        (["optimizer.betas=0.9"], "optimizer.betas=0.9 must be two numbers from 0 to below 1, such as [0.9,0.99]."),
        (
            ["planted.n_sites=2", "sae.n_inputs=1", "sae.normalize=none"],
            "planted features lie on one site each, so a transcoder has nothing to predict: leave n_inputs=0.",
        ),
        *(
            (over, "frozen_decoder=true would freeze a random dictionary, which finds nothing: leave it out.")
            for over in (["sae.frozen_decoder=true"], ["sae=route", "sae.inner.frozen_decoder=true"])
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_sentence(overrides, sentence, tmp_path):
    done = run(*overrides, "n_steps=1", f"hydra.run.dir={tmp_path}", module="planted")
    assert (done.returncode, done.stderr) == (1, f"planted: {sentence}\n")
