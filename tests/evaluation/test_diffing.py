"""Whose feature a latent is: the formula, the classes, and planted features of two models."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build

from sae_lab.evaluation import diffing


def test_the_ratio_is_that_of_the_norms_of_each_models_sources():
    """Two sites of two models: base, base, tuned, tuned."""
    W = torch.zeros(4, 4, 2)
    W[0, 0], W[0, 1], W[0, 2] = torch.tensor([3.0, 0]), torch.tensor([0.0, 4]), torch.tensor([5.0, 0])
    W[1, 1, 0], W[2, 3, 1] = 2, 0.1
    assert diffing.relative_norm(W).tolist() == pytest.approx([0.5, 0, 1, 0.5])
    assert diffing.cosine(W)[0].item() == pytest.approx(15 / 25)


@pytest.mark.parametrize(
    ("ratio", "name"),
    [(0, "base_only"), (0.1, "base_only"), (0.2, "between"), (0.4, "shared"), (0.6, "shared"), (0.9, "tuned_only")],
)
def test_classes(ratio, name):
    assert diffing.class_of(ratio) == name


def test_latents_that_never_fire_are_not_counted():
    W = torch.tensor([[[1.0], [1.0]], [[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]], [[1.0], [3.0]]])
    table = diffing.latent_table(W, torch.tensor([0.1, 0.2, 0.3, 0.0, 0.1]))
    assert table["class"].tolist() == ["shared", "base_only", "tuned_only", "shared", "between"]
    counts = {"latents_base_only": 1, "latents_shared": 1, "latents_tuned_only": 1, "latents_between": 1}
    assert diffing.class_counts(table) == counts


N_SHARED, N_OWN = 24, 12
FEATURES = F.normalize(torch.randn(N_SHARED + 2 * N_OWN, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
IN_BASE = torch.tensor([1.0] * N_SHARED + [1.0] * N_OWN + [0.0] * N_OWN)
IN_TUNED = torch.tensor([1.0] * N_SHARED + [0.0] * N_OWN + [1.0] * N_OWN)
TRUTH = ["shared"] * N_SHARED + ["base_only"] * N_OWN + ["tuned_only"] * N_OWN


def two_models(n: int, seed: int, loudness: float) -> torch.Tensor:
    """Rows with four of 48 features, of which the base model has 36 and the tuned one, `loudness` times louder, 36."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, len(FEATURES), generator=generator).topk(4).indices
    z = torch.zeros(n, len(FEATURES)).scatter(1, chosen, 1 + torch.rand(n, 4, generator=generator))
    x = torch.stack([(z * IN_BASE) @ FEATURES, (z * IN_TUNED) @ FEATURES * loudness], dim=1)
    return x + 0.02 * torch.randn(x.shape, generator=generator)


def share_classified_rightly(*overrides: str, loudness: float = 1.0, n_steps: int = 800) -> float:
    """Train a crosscoder; look at each planted feature's latent, the one whose row is nearest over both sources."""
    sae = build("batch_topk", "sae.decoder_norm=sum", *overrides, d_in=32, n_latents=96, n_sources=2)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3, fused=True)
    for i in range(n_steps):
        torch.stack(list(sae.losses(sae(two_models(512, i, loudness))).values())).sum().backward()
        sae.before_step()
        adam.step()
        adam.zero_grad()
        sae.after_step()
    planted = torch.stack([FEATURES * IN_BASE[:, None], FEATURES * IN_TUNED[:, None]], dim=1).flatten(1)
    W = sae.directions()
    nearest = (F.normalize(planted, dim=-1) @ F.normalize(W.flatten(1), dim=-1).T).argmax(1)
    table = diffing.latent_table(W, torch.ones(96))
    return sum(table["class"][i] == truth for i, truth in zip(nearest.tolist(), TRUTH, strict=True)) / len(TRUTH)


@pytest.mark.parametrize("loudness", [1.0, 3.0])
def test_planted_features_are_given_to_their_owner(loudness):
    assert share_classified_rightly(loudness=loudness) >= 0.95


def test_without_normalisation_the_louder_model_looks_like_the_owner():
    """Shared features of a model three times as loud have ratio 3/4; only the exclusive ones, half of all, stay."""
    assert share_classified_rightly("sae.normalize=none", loudness=3.0) == pytest.approx(0.5, abs=0.05)
