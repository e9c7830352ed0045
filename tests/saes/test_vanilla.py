"""The L1 penalty and its warm-up, which every penalised SAE shares."""

import pytest
import torch
from conftest import SAE_NAMES, build, planted

from sae_lab.saes.files import load_sae_folder, save_sae

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
    assert load_sae_folder(save_sae(sae, tmp_path)).steps == 1


class TestFreeNorms:
    def test_a_latent_gains_nothing_by_a_small_z_and_a_long_row(self):
        sae = build("vanilla", "sae.unit_norm=false", "sae.l1_coefficient=0.5")
        before = {name: term.item() for name, term in sae.losses(sae(X)).items()}
        scale = torch.linspace(0.2, 5, 64)
        with torch.no_grad():
            sae.W_dec.mul_(scale[:, None, None])
            sae.W_enc.div_(scale[:, None, None])
            sae.b_enc.div_(scale)
        after = {name: term.item() for name, term in sae.losses(sae(X)).items()}
        assert after == pytest.approx(before, rel=1e-5)
        assert before["sparsity"] > 0

    def test_with_unit_rows_the_penalty_is_the_plain_one_and_training_leaves_them_free(self):
        free, plain = build("vanilla", "sae.unit_norm=false"), build("vanilla")
        torch.testing.assert_close(free.losses(free(X))["sparsity"], plain.losses(plain(X))["sparsity"])
        torch.stack(list(free.losses(free(X)).values())).sum().backward()
        gradient = free.W_dec.grad.clone()
        free.before_step()
        assert torch.equal(free.W_dec.grad, gradient)
        torch.optim.SGD(free.parameters(), lr=1.0).step()
        free.after_step()
        assert free.W_dec.flatten(1).norm(dim=1).std() > 1e-4

    def test_it_recovers_the_planted_dictionary(self):
        sae = build("vanilla", "sae.unit_norm=false", "sae.normalize=none", n_latents=48)
        adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for i in range(1500):
            adam.zero_grad()
            torch.stack(list(sae.losses(sae(0.1 * planted(256, seed=i)[0])).values())).sum().backward()
            adam.step()
        directions = torch.nn.functional.normalize(sae.W_dec.detach().flatten(1), dim=1)
        assert (planted(1)[1].flatten(1) @ directions.T).max(dim=1).values.mean() >= 0.95
