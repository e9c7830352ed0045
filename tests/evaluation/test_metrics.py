"""metrics.py against numpy-like definitions and golden values computed by hand."""

import math

import pytest
import torch

from sae_lab.evaluation.metrics import (
    ROW_METRICS,
    DownstreamMetrics,
    ReconstructionMetrics,
    activation_counts,
    activation_histogram,
    batch_fvu,
    cross_entropy,
    kl_divergence,
    l0_histogram,
    to_log_probs,
)
from sae_lab.runtime.errors import UserError


def rows(n: int, s: int = 1, d: int = 16, seed: int = 0) -> torch.Tensor:
    return 5 + torch.randn(n, s, d, generator=torch.Generator().manual_seed(seed))


def totals(x: torch.Tensor, x_hat: torch.Tensor, code: torch.Tensor, batch: int) -> dict[str, float]:
    metrics = ReconstructionMetrics(code.shape[1])
    for part in zip(x.split(batch), x_hat.split(batch), code.split(batch), strict=True):
        metrics.update(*part)
    return metrics.compute()


def test_golden_c_explained_variance_on_shifted_data():
    """With noise of half the spread, fvu is 0.25 wherever the data lie (SAELens issue 659)."""
    x = rows(5000)
    x_hat = x + 0.5 * torch.randn(5000, 1, 16, generator=torch.Generator().manual_seed(1))
    assert 1 - totals(x, x_hat, torch.ones(5000, 4), 512)["fvu"] == pytest.approx(0.7484, abs=0.005)


@pytest.mark.parametrize("s", [1, 3])
def test_totals_do_not_depend_on_how_the_rows_are_batched(s):
    x, x_hat = rows(100, s), rows(100, s, seed=1)
    code = (torch.rand(100, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    whole, parts = totals(x, x_hat, code, 100), totals(x, x_hat, code, 7)
    assert whole.keys() == parts.keys()
    assert all(whole[name] == pytest.approx(parts[name], rel=1e-12) for name in whole)


def test_every_reconstruction_metric_is_its_definition():
    x, x_hat = rows(60, s=2), rows(60, s=2, seed=1)
    code = torch.zeros(60, 5)
    code[:30, 0], code[:10, 1], code[0, 2] = 1.5, 0.1, -2.0
    values = totals(x, x_hat, code, 16)
    e = x - x_hat
    l0 = torch.tensor([3.0, *[2.0] * 9, *[1.0] * 20, *[0.0] * 30])
    expected = {
        "fvu": e.square().sum() / (x - x.mean(0)).square().sum(),
        "nmse": (e / (x.std(-1, keepdim=True) + 1e-5)).square().mean(),
        "cosine_similarity": ((x * x_hat).sum(-1) / (x.norm(dim=-1) * x_hat.norm(dim=-1))).mean(),
        "l0": l0.mean(),
        "l0_std": l0.std(correction=0),
        "dead_fraction": 2 / 5,
        "n_eval_tokens": 60,
    }
    variance = (x - x.mean(0)).square().sum((0, 2))
    expected |= {f"fvu_{i}": e[:, i].square().sum() / variance[i] for i in range(2)}
    assert values.keys() == expected.keys()
    assert all(values[name] == pytest.approx(float(expected[name]), rel=1e-5) for name in expected)
    assert batch_fvu(x, x_hat).item() == pytest.approx(values["fvu"], rel=1e-5)


def test_a_routed_sae_is_judged_where_it_says_something():
    """As if the sources that it leaves alone were not there; the mean is still that of the whole data set."""
    x, x_hat, code = rows(60, s=2), rows(60, s=2, seed=1), torch.ones(60, 4)
    covers = torch.zeros(60, 2, dtype=torch.bool)
    covers[:45, 0] = covers[45:, 1] = True
    metrics = ReconstructionMetrics(4)
    for part in zip(x.split(16), x_hat.split(16), code.split(16), covers.split(16), strict=True):
        metrics.update(*part)
    values, e, centred = metrics.compute(), (x - x_hat)[covers], (x - x.mean(0))[covers]
    expected = {
        "fvu": e.square().sum() / centred.square().sum(),
        "fvu_1": e[45:].square().sum() / centred[45:].square().sum(),
        "nmse": (e / (x[covers].std(-1, keepdim=True) + 1e-5)).square().mean(),
        "cosine_similarity": torch.cosine_similarity(x[covers], x_hat[covers], dim=-1).mean(),
        "share_0": 0.75,
        "share_1": 0.25,
        "n_eval_tokens": 60,
    }
    assert {name: values[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, 1e-5)
    torch.testing.assert_close(metrics.mean_activation(), x.mean(0))


def test_perfect_and_mean_reconstructions_mark_the_scale():
    x, code = rows(50), torch.ones(50, 2)
    assert totals(x, x, code, 50)["fvu"] == 0
    assert totals(x, x.mean(0).expand_as(x), code, 50)["fvu"] == pytest.approx(1, rel=1e-5)


def test_downstream_metrics_on_known_distributions():
    """Two tokens of a vocabulary of two: cross-entropies and KL by hand."""
    targets = torch.tensor([[1], [1]])

    def log_probs(p: float) -> torch.Tensor:
        logits = torch.tensor([math.log(1 - p), math.log(p)]).expand(2, 1, 2)
        return to_log_probs(logits)

    metrics = DownstreamMetrics()
    cases = {"clean": log_probs(0.8), "spliced": log_probs(0.5), "zero": log_probs(0.1), "mean": log_probs(0.2)}
    kl = kl_divergence(cases["clean"].exp(), cases["clean"], cases["spliced"])
    metrics.update(kl=kl, **{f"ce_{case}": cross_entropy(p, targets) for case, p in cases.items()})
    ce = {"clean": -math.log(0.8), "spliced": -math.log(0.5), "zero": -math.log(0.1), "mean": -math.log(0.2)}
    expected = {f"ce_{case}": value for case, value in ce.items()}
    expected["ce_degradation"] = ce["spliced"] - ce["clean"]
    expected["loss_recovered"] = (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"])
    expected["kl"] = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert metrics.compute() == pytest.approx(expected, rel=1e-6)


def test_l0_histogram_tells_bos_apart():
    table = l0_histogram(torch.tensor([2, 0, 2, 3]), torch.tensor([True, False, False, False]))
    assert [(row["bos"], row["other"]) for row in table] == [(0, 1), (0, 0), (1, 1), (0, 1)]


def test_nothing_is_recovered_where_zero_ablation_costs_nothing():
    """JSON has no word for 0 / 0."""
    metrics = DownstreamMetrics()
    metrics.update(**{name: torch.ones(1, 3) for name in DownstreamMetrics.TOTALS})
    values = metrics.compute()
    assert values["ce_degradation"] == 0
    assert "loss_recovered" not in values


def max_error(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    return (x - x_hat).abs().amax(dim=-1)


def test_a_registered_row_metric_is_its_mean_over_the_rows_and_sources_that_count(monkeypatch):
    x, x_hat, code = rows(60, s=2), rows(60, s=2, seed=1), torch.ones(60, 4)
    before = totals(x, x_hat, code, 16)
    monkeypatch.setitem(ROW_METRICS, "max_error", max_error)
    values, error = totals(x, x_hat, code, 16), (x - x_hat).abs().amax(dim=-1)
    assert values.pop("max_error") == pytest.approx(error.double().mean().item(), rel=1e-12)
    assert values == before

    predicted = torch.rand(60, 2, generator=torch.Generator().manual_seed(3)) < 0.5
    metrics = ReconstructionMetrics(4)
    metrics.update(x, x_hat, code, predicted)
    assert metrics.compute()["max_error"] == pytest.approx(error[predicted].double().mean().item(), rel=1e-12)

    monkeypatch.delitem(ROW_METRICS, "max_error")
    assert "max_error" in metrics.compute()  # it was there when these metrics were constructed
    assert totals(x, x_hat, code, 16) == before


def test_row_metrics_of_several_processes_are_summed(monkeypatch):
    monkeypatch.setitem(ROW_METRICS, "max_error", max_error)
    x, x_hat, code = rows(60, s=2), rows(60, s=2, seed=1), torch.ones(60, 4)
    first, second = ReconstructionMetrics(4), ReconstructionMetrics(4)
    first.update(x[:25], x_hat[:25], code[:25])
    second.update(x[25:], x_hat[25:], code[25:])
    first.merge_state(second)
    assert first.compute() == pytest.approx(totals(x, x_hat, code, 60), rel=1e-12)


def test_any_row_metric_can_be_removed(monkeypatch):
    monkeypatch.delitem(ROW_METRICS, "nmse")
    x, code = rows(20), torch.ones(20, 4)
    assert list(totals(x, x + 1, code, 20))[:3] == ["fvu", "l0", "l0_std"]


def test_a_row_metric_of_another_shape_is_refused(monkeypatch):
    """Shape (b,) would broadcast against (b, 1) without an error."""
    monkeypatch.setitem(ROW_METRICS, "total", lambda x, x_hat: (x - x_hat).abs().sum(dim=(1, 2)))
    with pytest.raises(UserError, match=r"the metric total must return shape \(b, s\) = \(20, 1\), not \(20,\)"):
        totals(rows(20), rows(20, seed=1), torch.ones(20, 4), 20)


def test_the_states_have_one_order_whatever_the_order_of_registration(monkeypatch):
    """Processes add them up one after the other: another order would add fvu's error to another metric's."""
    before = list(ReconstructionMetrics(8).metric_state)
    nmse = ROW_METRICS["nmse"]
    monkeypatch.delitem(ROW_METRICS, "nmse")
    monkeypatch.setitem(ROW_METRICS, "nmse", nmse)
    assert list(ROW_METRICS)[-1] == "nmse"
    assert list(ReconstructionMetrics(8).metric_state) == before


def test_active_entries_are_counted_by_quarters_of_an_octave():
    code = torch.tensor([[0.0, 1.0, 1.1], [-1.3, 2.0, 0.0], [1e-9, 1e9, 0.0]])
    table = activation_histogram(activation_counts(code))
    assert {row["log2"]: row["entries"] for row in table if row["entries"]} == {
        -15.875: 1, 0.125: 2, 0.375: 1, 1.125: 1, 15.875: 1,
    }  # fmt: skip
    assert activation_histogram(activation_counts(torch.zeros(2, 3))) == []
