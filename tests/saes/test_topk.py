"""The warm-up of k, which every SAE with a rule over the k largest shares."""

import pytest
import torch
from conftest import SAE_NAMES, build, planted

from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, TopKSAE
from sae_lab.saes.files import load_sae_folder, save_sae

WITH_K_WARMUP = [name for name in SAE_NAMES if hasattr(build(name), "k_warmup")]
X = planted(40)[0]


def mean_l0(sae) -> float:
    return l0_per_row(sae(X).code).float().mean().item()


@pytest.mark.parametrize("name", WITH_K_WARMUP)
def test_k_falls_linearly_to_its_final_value_and_stays(name):
    sae = build(name, "sae.k_warmup=4", "sae.k_start=12")
    assert [mean_l0(sae) for _ in range(7)] == [12, 10, 8, 6, 4, 4, 4]


def test_k_starts_at_the_width_of_the_input_or_at_the_whole_dictionary():
    assert TopKSAE(k=4, d_in=16, n_latents=64, k_warmup=3).current_k == 16
    assert TopKSAE(k=4, d_in=16, n_latents=64, k_warmup=3, n_sources=2).current_k == 32
    assert TopKSAE(k=4, d_in=16, n_latents=8, k_warmup=3).current_k == 8


def test_k_between_whole_numbers_is_kept_by_the_batch_rule_and_rounded_by_the_row_rule():
    batch, row = (cls(k=3, d_in=16, n_latents=64, k_warmup=4, k_start=8) for cls in (BatchTopKSAE, TopKSAE))
    assert [mean_l0(batch) for _ in range(3)] == [8, 6.75, 5.5]
    assert [mean_l0(row) for _ in range(3)] == [8, 7, 6]


@pytest.mark.parametrize("name", WITH_K_WARMUP)
def test_a_saved_sae_remembers_how_far_it_was_and_evaluation_neither_counts_nor_waits(name, tmp_path):
    sae = build(name, "sae.k_warmup=4", "sae.k_start=12")
    sae(X)
    sae.reconstruct(X)
    sae.eval()(X)
    assert sae.current_k == 4
    loaded = load_sae_folder(save_sae(sae, tmp_path)).train()
    assert loaded.current_k == 10


@pytest.mark.parametrize("k_start", [0, 65])
def test_a_start_beyond_the_dictionary_is_refused(k_start):
    with pytest.raises(UserError, match=rf"k_start={k_start} must lie between 1 and the dictionary's 64 latents"):
        TopKSAE(k=4, d_in=16, n_latents=64, k_warmup=3, k_start=k_start)


def test_gradients_during_the_warm_up_are_those_of_a_dense_top_k():
    sae = build("topk", "sae.k_warmup=4", "sae.k_start=12", "sae.normalize=none").double()
    x = X.double()
    mine = torch.autograd.grad(sae(x).x_hat.square().sum(), [sae.W_enc, sae.W_dec])
    h = (x - sae.b_dec)[:, 0] @ sae.W_enc[:, 0].T
    z = torch.zeros_like(h).scatter(1, h.topk(12).indices, h.relu().gather(1, h.topk(12).indices))
    dense = torch.autograd.grad((z @ sae.W_dec[:, 0]).square().sum(), [sae.W_enc, sae.W_dec])
    torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-12)
