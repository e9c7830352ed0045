"""The running quantile: a threshold that training uses as well."""

import pytest
import torch
from conftest import build, planted

from sae_lab.ops.sparse import l0_per_row, smallest_active
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, MatryoshkaSAE

X = planted(64)[0] + 0.1


def running(**settings) -> BatchTopKSAE:
    return BatchTopKSAE(k=4, d_in=16, n_latents=64, quantile="running", **settings)


@pytest.mark.parametrize("shape", [(11, 16), (11, 1, 16), (11, 3, 16), (1, 11, 1, 16)])
def test_training_keeps_exactly_floor_k_b_entries_whatever_the_axes(shape):
    """P-07, P-08: b counts rows, and a k that is not whole is rounded down after it was multiplied."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sae = BatchTopKSAE(k=1.5, d_in=16, n_latents=64, n_sources=shape[1] if len(shape) == 3 else 1)
    assert l0_per_row(sae(x).code).sum() == 16


def test_a_k_as_large_as_the_dictionary_keeps_all_that_is_positive():
    """P-08."""
    sae = BatchTopKSAE(k=64, d_in=16, n_latents=64)
    torch.testing.assert_close(sae(X).code.to_dense(), sae.pre_activations(sae.sources.normalizer(X)[0]).relu())


def test_the_first_batch_gives_its_own_quantile_and_the_next_what_exceeds_that():
    sae, other = running(), planted(64, seed=1)[0]
    first = sae(X).code
    assert l0_per_row(first).sum() == 4 * 64
    assert sae.threshold.item() == pytest.approx(smallest_active(first).item())
    threshold = sae.threshold.item()
    h = sae.pre_activations(sae.sources.normalizer(other)[0])
    torch.testing.assert_close(sae(other).code.to_dense(), h * (h > threshold))


def test_the_threshold_moves_by_its_rate_times_the_excess_of_l0():
    sae = running(quantile_rate=0.1)
    for start, l0 in ((1.0, 3.0), (1.5, 5.0), (0.2, 64.0), (4.0, 0.0), (2.0, 4.0)):
        sae.threshold.fill_(start)
        sae.threshold_updates.fill_(7)
        code = torch.zeros(10, 64)
        code[:, : int(l0)] = 5.0
        sae.observe(code)
        assert sae.threshold.item() == pytest.approx(start * (1 + 0.1 * min(l0 / 4 - 1, 1)))
        assert sae.threshold_updates == 8


def test_the_threshold_becomes_the_quantile_of_the_pre_activations():
    """Without training, where that quantile is a number: the k·n-th largest of relu(h) over all n rows."""
    sae = running(quantile_rate=0.05)
    for i in range(200):
        sae(planted(256, seed=i)[0])
    h = sae.pre_activations(sae.sources.normalizer(planted(50_000, seed=999)[0])[0])
    quantile = h.relu().flatten().kthvalue(h.numel() - 4 * 50_000 + 1).values
    assert sae.threshold.item() == pytest.approx(quantile.item(), rel=0.01)


def test_a_row_is_judged_alike_in_training_and_deployment_and_calibration_leaves_that_alone():
    sae = running()
    for _ in range(3):
        sae(X)
    trained, threshold = sae.encode(X[:9]), sae.threshold.clone()
    sae.calibrate(planted(64, seed=5)[0], 0)
    assert torch.equal(sae.threshold, threshold)
    assert torch.equal(sae.eval().encode(X[:9]), trained)
    assert not sae.batch_rule
    assert build("batch_topk").batch_rule


def test_it_follows_the_warm_up_of_k_and_serves_nested_dictionaries():
    settings = {"quantile": "running", "quantile_rate": 0.2, "k_warmup": 100, "k_start": 16}
    sae = MatryoshkaSAE(k=4, d_in=16, n_latents=64, **settings)
    l0 = [l0_per_row(sae(planted(256, seed=i)[0]).code).float().mean().item() for i in range(200)]
    for n, k in ((0, 16.0), (50, 10.0), (75, 7.0), (199, 4.0)):
        assert l0[n] == pytest.approx(k, rel=0.1)


def test_training_keeps_l0_at_k():
    sae = build("batch_topk", "k=3", "sae.quantile=running", "sae.normalize=none")
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
    l0 = []
    for i in range(300):
        out = sae(planted(256, seed=i)[0])
        adam.zero_grad()
        torch.stack(list(sae.losses(out).values())).sum().backward()
        adam.step()
        sae.after_step()
        l0.append(l0_per_row(out.code).float().mean())
    assert torch.stack(l0[100:]).mean() == pytest.approx(3, rel=0.02)


def test_an_unknown_word_is_refused():
    with pytest.raises(UserError, match=r"quantile=mean is not known: choose batch or running"):
        BatchTopKSAE(k=2, d_in=2, n_latents=4, quantile="mean")
