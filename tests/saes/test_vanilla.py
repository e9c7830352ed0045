"""The L1 penalty and its warm-up, which every penalised SAE shares."""

import pytest
import torch
from conftest import SAE_NAMES, build, planted

from sae_lab.checkpoint import load_sae, save_sae

PENALIZED = [name for name in SAE_NAMES if hasattr(build(name), "sparsity_warmup")]
X = planted(32)[0]


def test_the_penalty_is_a_sum_over_latents_and_a_mean_over_rows():
    """P-37: a mean over latents would make the coefficient depend on the size of the dictionary."""
    sae = build("vanilla", "sae.l1_coefficient=0.5")
    out = sae(X)
    torch.testing.assert_close(sae.losses(out)["sparsity"], 0.5 * out.code.sum() / 32)


@pytest.mark.parametrize("name", PENALIZED)
def test_the_coefficient_rises_linearly_and_stays(name):
    sae, whole = build(name, "sae.sparsity_warmup=4"), build(name, "sae.sparsity_warmup=0")
    for n in range(1, 7):
        penalty = whole.losses(whole(X))["sparsity"]
        torch.testing.assert_close(sae.losses(sae(X))["sparsity"], penalty * min(n / 4, 1))
        assert penalty > 0


@pytest.mark.parametrize("name", PENALIZED)
def test_only_training_batches_count_and_a_saved_sae_remembers_them(name, tmp_path):
    sae = build(name, "sae.sparsity_warmup=4")
    sae(X)
    for training in (False, True):
        sae.train(training)
        sae.reconstruct(X)
    sae.eval()(X)
    assert sae.steps == 1
    assert load_sae(save_sae(sae, tmp_path)).steps == 1
