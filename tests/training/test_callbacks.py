"""Callbacks of conf/callbacks and metrics of one's own: right values, and the same after a stop."""

import json
import signal

import pandas as pd
import pytest
import torch
from groups import assert_same_run, config, stop_at_batch

from sae_lab.activations.building import build_data
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.evaluation.metrics import ROW_METRICS, metric
from sae_lab.interop.load import load_sae
from sae_lab.runs.loading import load_run
from sae_lab.runtime.errors import SafeStop, UserError
from sae_lab.sweeps.shared_stream import train_jobs
from sae_lab.training.job import read_job
from sae_lab.training.run import train_run

BOTH = [
    "callbacks=[splice_ce,keep_best]",
    "callbacks.keep_best.metric=val/loss_recovered",
    "callbacks.keep_best.mode=max",
]
OWN = "+metric.worst={_target_: test_callbacks.worst, times: 2.0}"


def worst(x: torch.Tensor, x_hat: torch.Tensor, times: float = 1.0) -> torch.Tensor:
    return times * (x - x_hat).abs().amax(dim=-1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with both callbacks and a metric of one's own."""
    folder = tmp_path_factory.mktemp("whole")
    train_run(config(folder, "sae=topk", *BOTH, OWN))
    return folder


def test_validation_logs_the_evaluations_cross_entropy(whole):
    """The best SAE is one of a validation: what was logged there is what the evaluation finds on the same text."""
    best = json.loads((whole / "best" / "best.json").read_text())
    log = pd.read_csv(whole / "metrics.csv").dropna(subset=["val/loss_recovered"])
    assert best["value"] == pytest.approx(log["val/loss_recovered"].max(), rel=1e-6)
    data = build_data(config(whole))
    data.n_eval_tokens = data.n_val_tokens
    metrics = evaluate(load_sae(whole / "best"), data).metrics
    assert best["value"] == pytest.approx(metrics["loss_recovered"], rel=1e-4)
    row = log[log["step"] == best["step"] - 1].iloc[0]
    assert row["val/ce_degradation"] == pytest.approx(metrics["ce_degradation"], rel=1e-4)
    assert row["val/fvu"] == pytest.approx(metrics["fvu"], rel=1e-4)


def test_the_log_has_the_first_and_the_last_step(whole):
    assert pd.read_csv(whole / "metrics.csv").dropna(subset=["loss"])["step"].tolist() == [0, 2, 5, 8, 11]


def test_callbacks_change_no_bit_of_the_run(whole, tmp_path):
    train_run(config(tmp_path, "sae=topk"))
    for file in ("sae/sae.safetensors", "figures/l0_per_token.csv"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_the_best_sae_says_where_it_comes_from(whole):
    best, last = (json.loads((whole / name / "config.json").read_text())["provenance"] for name in ("best", "sae"))
    assert best == last


def test_a_stopped_run_keeps_the_same_best(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 8, signal.SIGTERM)
        with pytest.raises(SafeStop):
            train_run(config(tmp_path, "sae=topk", *BOTH, OWN))
    train_run(config(tmp_path, "sae=topk", *BOTH, OWN))
    assert_same_run(whole, tmp_path)
    for file in ("best/best.json", "best/sae.safetensors"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_a_group_logs_and_keeps_the_same(whole, tmp_path):
    other = ["sae=topk", "callbacks=[splice_ce]", "k=8"]
    jobs = [read_job(config(tmp_path / "a", "sae=topk", *BOTH, OWN)), read_job(config(tmp_path / "b", *other))]
    train_jobs(jobs)
    assert_same_run(whole, tmp_path / "a")
    assert (tmp_path / "a" / "best" / "best.json").read_bytes() == (whole / "best" / "best.json").read_bytes()
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert "worst" not in metrics
    assert "own_metrics" not in metrics
    assert "val/loss_recovered" in pd.read_csv(tmp_path / "b" / "metrics.csv")


def test_a_metric_of_ones_own_is_logged_and_written(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["own_metrics"] == ["worst"]
    sae, data, _ = load_run(whole, trust="test_callbacks")
    held_out = data.held_out(data.n_eval_tokens)
    x = torch.cat([held_out.read(part).x for part in held_out.parts])
    assert metrics["worst"] == pytest.approx(worst(x, sae.reconstruct(x), 2.0).mean().item(), rel=1e-5)
    assert metrics["train_mode"]["worst"] == metrics["worst"]
    assert pd.read_csv(whole / "metrics.csv")["val/worst"].notna().any()
    with pytest.raises(UserError, match=r"asks to run test_callbacks.worst \(metric.worst._target_\)"):
        load_run(whole)


def test_the_decorator_registers_by_name(monkeypatch):
    monkeypatch.setattr("sae_lab.evaluation.metrics.ROW_METRICS", dict(ROW_METRICS))
    from sae_lab.evaluation import metrics

    assert metrics.metric(worst) is worst
    assert metrics.ROW_METRICS["worst"] is worst
    for name in ("nmse", "fvu_1", "l0", "train_mode", "n_latents", "a b"):
        worst_by_name = lambda x, x_hat: x  # noqa: E731
        worst_by_name.__name__ = name
        with pytest.raises(UserError, match=f"cannot be called {name}"):
            metric(worst_by_name)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["callbacks=keep_best", "callbacks.keep_best.metric=val/ce"],
            "metric=val/ce is not logged .* give one of val/dead",
        ),
        (
            ["callbacks=keep_best", "callbacks.keep_best.metric=val/loss_recovered"],
            r"is logged by splice_ce only: type callbacks=\[splice_ce,keep_best\]",
        ),
        (["+metric.fvu._target_=test_callbacks.worst"], "cannot be called fvu"),
        (["+metric.mine._target_=test_callbacks.nope"], "metric.mine._target_=test_callbacks.nope cannot be imported"),
    ],
)
def test_what_cannot_be_kept_or_measured_is_told(overrides, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train_run(config(tmp_path, "sae=topk", *overrides))
