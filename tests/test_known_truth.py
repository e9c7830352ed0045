"""Rows of a hierarchy are what they say, and the figures of known truth have the values that follow from a code."""

import numpy as np
import pytest
import torch
from shell import run

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_json
from sae_lab.saes.vanilla import VanillaSAE
from sae_lab.studies.hierarchy import HierarchicalFeatures, spread_apart, zipf
from sae_lab.studies.known_truth import Firing, Matching
from sae_lab.studies.planted_features import PlantedFeatures
from sae_lab.studies.recovery import recovery

SIZES = {"d_in": 64, "n_features": 60, "n_roots": 4, "branching": 3, "depth": 2}
FOREST = HierarchicalFeatures(**SIZES)
N = 20_000


@pytest.fixture(scope="module")
def drawn():
    return FOREST.rows_at(0, N, seed=5)


@pytest.mark.parametrize("planted", [FOREST, PlantedFeatures(d_in=16, n_trees=4, n_children=2, active=2.0, n_sites=2)])
def test_a_row_depends_on_its_number_alone(planted):
    whole = planted.rows_at(0, 700, seed=3)
    for start, n in [(0, 1), (255, 2), (256, 256), (100, 555)]:
        part = planted.rows_at(start, n, seed=3)
        assert all(torch.equal(a, b[start : start + n]) for a, b in zip(part, whole, strict=True))
    assert not torch.equal(planted.rows_at(0, 9, seed=4).x, whole.x[:9])
    assert not torch.equal(whole.x[:256], whole.x[256:512])


def test_a_row_is_the_sum_of_its_features(drawn):
    x = drawn.strengths @ FOREST.directions + FOREST.offset
    torch.testing.assert_close(drawn.x[:, 0], x)
    assert FOREST.offset.norm().item() == pytest.approx(0.5)
    torch.testing.assert_close(FOREST.directions.norm(dim=-1), torch.ones(60))


def test_the_forest_is_numbered_level_by_level():
    assert FOREST.parents.tolist() == [-1] * 4 + [i // 3 for i in range(48)] + [-1] * 8
    assert {name: (s.start, s.stop) for name, s in FOREST.levels.items()} == {
        "roots": (0, 4),
        "children": (4, 52),
        "level_1": (4, 16),
        "level_2": (16, 52),
        "unrelated": (52, 60),
    }


def test_a_child_needs_its_parent_and_has_no_rival(drawn):
    active = drawn.strengths > 0
    children = FOREST.children
    assert not (active[:, children] & ~active[:, FOREST.parents[children]]).any()
    assert active[:, children].view(N, -1, 3).sum(dim=-1).max() == 1


def test_features_are_as_frequent_as_they_should_be(drawn):
    plain = HierarchicalFeatures(**SIZES | {"depth": 0, "max_probability": 0.3, "min_probability": 0.01})
    frequency = (plain.rows_at(0, N, seed=5).strengths > 0).float().mean(dim=0)
    torch.testing.assert_close(frequency, zipf(60, 0.5, 0.3, 0.01), atol=0.01, rtol=0)
    roots = (drawn.strengths > 0).float().mean(dim=0)[:4]
    torch.testing.assert_close(roots, FOREST.probabilities[:4], atol=0.01, rtol=0)


def test_compensation_divides_by_the_parent_and_makes_up_for_rivals():
    base = zipf(60, 0.5, 0.4, 5e-4)
    own, rivals, parent = base[4], base[5] + base[6], base[0]
    assert FOREST.probabilities[4].item() == pytest.approx((own / parent * (1 + rivals / parent)).clamp_max(1).item())
    free = HierarchicalFeatures(**SIZES, exclusive=0.0)
    assert free.probabilities[4].item() == pytest.approx((own / parent).item())
    assert torch.equal(HierarchicalFeatures(**SIZES, compensate=False).probabilities, base)


def test_strengths_follow_their_parent_or_only_need_it():
    quiet = {"spread_mean": 0.0, "spread_std": 0.0}
    kept = HierarchicalFeatures(**SIZES, **quiet, scale_by_parent=False).rows_at(0, 2000, seed=1).strengths
    mean = torch.linspace(5, 4, 60)
    torch.testing.assert_close(kept[kept > 0], mean.expand(2000, -1)[kept > 0])
    scaled = HierarchicalFeatures(**SIZES, spread_mean=0.0, spread_std=1.0)
    still = scaled.magnitudes[1]
    strengths = scaled.rows_at(0, 2000, seed=1).strengths
    for child in range(4, 16):
        on = strengths[:, child] > 0
        ratio = strengths[on, child] / strengths[on, scaled.parents[child]] * mean[scaled.parents[child]]
        assert ratio.std().item() == pytest.approx(still[child].item(), rel=0.35)


def test_the_copula_correlates_features_that_share_factors():
    planted = HierarchicalFeatures(
        **SIZES | {"depth": 0, "rank": 2}, max_probability=0.5, min_probability=0.499, correlation=0.5
    )
    factor, own, _ = planted.copula
    torch.testing.assert_close(factor.square().sum(dim=1) + own.square(), torch.ones(60))
    active = (planted.rows_at(0, N, seed=5).strengths > 0).double()
    found, latent = np.corrcoef(active.T.numpy()), (factor @ factor.T).numpy()
    upper = np.triu_indices(60, 1)
    expected = 2 / np.pi * np.arcsin(latent[upper].clip(-1, 1))  # of two normals cut at their medians
    assert np.abs(found[upper] - expected).max() < 0.04


def test_directions_are_moved_apart():
    before = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    after = spread_apart(before, 200, 0.01)
    overlap = [((d @ d.T).triu(1) ** 2).sum().item() for d in (before, after)]
    assert overlap[1] == pytest.approx((40**2 / 16 - 40) / 2, rel=0.02)  # Welch's bound
    assert overlap[0] > 1.1 * overlap[1]
    torch.testing.assert_close(spread_apart(before, 0, 0.01), before)


def test_too_few_features_are_refused():
    with pytest.raises(UserError, match="n_features=20 is less than the 52 of the forest"):
        HierarchicalFeatures(**SIZES | {"n_features": 20})


def dictionary(rows: torch.Tensor) -> VanillaSAE:
    """An SAE with these decoder rows."""
    sae = VanillaSAE(d_in=rows.shape[1], n_latents=len(rows), l1_coefficient=0.0, normalize="none")
    with torch.no_grad():
        sae.W_dec[:, 0] = rows
    return sae


class Orthogonal(PlantedFeatures):
    """Trees whose directions are unit vectors of the axes."""

    directions = torch.eye(6)


TWO_TREES = Orthogonal(d_in=6, n_trees=2, n_children=2, active=1.0)  # roots 0, 1; children 2, 3 of 0 and 4, 5 of 1
AXES = torch.eye(6)


def test_the_match_is_one_to_one_and_signs_do_not_matter():
    sae = dictionary(torch.stack([-AXES[0], AXES[0] + 0.1 * AXES[2], AXES[1]]))
    matching = Matching.of(sae, TWO_TREES)
    assert matching.latent.tolist() == [0, 2, 1, -1, -1, -1]
    assert matching.best_feature.tolist() == [0, 0, 1]
    figures = matching.figures()
    assert figures["mcc"].item() == pytest.approx((2 + 0.1 / 1.01**0.5) / 3)
    assert figures["uniqueness"].item() == pytest.approx(2 / 3)


def test_classifiers_are_judged_by_the_feature_of_their_direction():
    matching = Matching.of(dictionary(AXES[:2]), TWO_TREES)
    firing = Firing(matching)
    truth = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]]).bool()
    active = torch.cat([truth, torch.zeros(4, 4, dtype=torch.bool)], dim=1)
    fires = torch.tensor(
        [[1, 0], [1, 1], [0, 0], [1, 0]]
    ).bool()  # 2 hits, 1 false, 1 missed; 0 hits, 1 false, 1 missed
    for i in range(4):
        firing.update(fires[i : i + 1], active[i : i + 1])
    figures = {name: float(value) for name, value in firing.figures().items()}
    assert figures["precision"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["recall"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["accuracy"] == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert figures["true_l0"] == 1


def test_absorption_counts_rows_where_a_childs_latent_stands_for_its_parent():
    rows = AXES.clone()
    rows[2] = AXES[2] + AXES[0]  # the latent of child 2 carries root 0; that of child 3 does not
    matching = Matching.of(dictionary(rows), TWO_TREES)
    active = torch.tensor([[1, 0, 1, 0, 0, 0]] * 2 + [[1, 0, 0, 1, 0, 0]] * 2 + [[1, 0, 0, 0, 0, 0]] * 4).bool()
    fires = active.clone()
    fires[0, 0] = fires[2, 0] = fires[4, 0] = False  # the root is missed beside child 2, beside child 3, and alone
    firing = Firing(matching)
    firing.update(fires, active)
    figures = firing.absorption()
    assert figures["absorption"] == pytest.approx(1 / 4)
    assert figures["missed_with_child"] == pytest.approx(2 / 4)
    assert figures["missed_alone"] == pytest.approx(1 / 4)
    assert firing.absorbed().tolist() == [0, 0, 0.5, 0, 0, 0]
    assert matching.figures()["parent_in_child"].item() == pytest.approx(0.5**0.5 / 4)


def test_hedging_is_what_a_latent_has_of_relatives_without_a_latent():
    mixed = AXES[0] + 0.5 * AXES[2]
    matching = Matching.of(dictionary(torch.stack([mixed, AXES[1]])), TWO_TREES)
    figures = matching.figures()
    cosine = 1 / 1.25**0.5
    assert figures["child_in_parent"].item() == pytest.approx((0.5 * cosine + 0 + 0 + 0) / 4)
    delta = ((1 - cosine) ** 2 + (0.5 * cosine) ** 2) ** 0.5
    projected, expected = 0.5 * cosine / 2, delta * (2 / 6) ** 0.5 / 2  # means over the two roots
    assert figures["hedging"].item() == pytest.approx((projected - expected) / (1 - expected), rel=1e-5)
    clean = Matching.of(dictionary(AXES[:2]), TWO_TREES).figures()
    assert clean["hedging"] == clean["child_in_parent"] == 0


def test_a_perfect_sae_has_perfect_figures():
    planted = HierarchicalFeatures(d_in=64, n_features=40, n_roots=4, branching=2, depth=2, orthogonalize=0, seed=1)
    sae = dictionary(planted.directions)
    with torch.no_grad():
        sae.W_enc[:, 0] = torch.linalg.pinv(planted.directions).T
        sae.b_dec[0] = planted.offset
        sae.b_enc.fill_(-1e-3)  # rounding makes no latent fire
    figures, levels, features = recovery(sae, planted, n_rows=3000)
    for name in ("mcc", "mmcs", "found", "uniqueness", "precision", "shrinkage"):
        assert figures[name] == pytest.approx(1, abs=1e-3), name
    assert figures["recall"] > 0.9  # features that no row has count as 0
    assert figures["l0"] == pytest.approx(figures["true_l0"], rel=1e-3)
    assert figures["fvu"] < 1e-6
    assert figures["absorption"] == figures["missed_with_child"] == 0
    assert levels["level"].tolist() == ["roots", "children", "level_1", "level_2", "unrelated"]
    assert levels["found"].tolist() == [1.0] * 5
    assert features["level"].tolist() == ["roots"] * 4 + ["level_1"] * 8 + ["level_2"] * 16 + ["unrelated"] * 12
    assert features["latent"].tolist() == list(range(40))


SMALL = ["planted=hierarchy", "planted.d_in=16", "planted.n_features=48", "planted.n_roots=4", "planted.depth=1"]


@pytest.mark.process
@pytest.mark.parametrize("sae", ["batch_topk", "jumprelu"])
def test_the_command_measures_a_hierarchy(sae, tmp_path):
    sizes = ["n_latents=24", "k=3", "batch_size=64", "n_steps=20", "n_eval_rows=600", "device=cpu"]
    done = run(*SMALL, *sizes, f"sae={sae}", f"hydra.run.dir={tmp_path}", module="planted")
    assert done.returncode == 0, done.stderr
    assert "level_1" in done.stdout
    figures = read_json(tmp_path / "planted.json")
    assert {"mcc", "f1", "uniqueness", "l0", "true_l0", "found_roots", "found_children"} <= set(figures)
    assert figures["levels"]["level_1"]["features"] == 16
    assert (tmp_path / "figures" / "recovery.png").is_file()
    assert len((tmp_path / "figures" / "features.csv").read_text().splitlines()) == 49
    assert (tmp_path / "sae" / "sae.safetensors").is_file()
