"""Runs that share a stream: each equals the same run alone to the bit, whatever the others are and do."""

import json
import logging
from pathlib import Path

import pytest
import torch
from groups import N_STEPS, assert_same_run, config, stop_at_batch, train_each

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import Interrupted, UserError
from sae_lab.sweeps.shared_stream import group_by_stream, has_room, train_group, train_jobs
from sae_lab.sweeps.status import read_status
from sae_lab.training.job import read_job
from sae_lab.training.run import train_run

# Architectures, widths, rates, schedules, clipping, precision and intervals differ; text and language model do not.
MEMBERS = {
    "topk": ["sae=topk", "k=4", "optimizer.lr=3e-3"],
    "batch_topk": ["sae=batch_topk", "k=8", "expansion=3", "schedule=warmup_decay", "sae.dead_after=2"],
    "vanilla": ["sae=vanilla", "n_latents=100", "max_grad_norm=0.01", "sae.seed=5", "trainer.checkpoint_every=2"],
    "gated": ["sae=gated", "optimizer.betas=[0.5,0.9]", "trainer.precision=bf16-mixed"],
}
BAD = ["sae=vanilla", "optimizer.lr=1e30"]


def together(root: Path, *names: str, **options) -> None:
    train_jobs([read_job(config(root / name, *MEMBERS.get(name, BAD))) for name in names], **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return train_each(tmp_path_factory.mktemp("alone"), MEMBERS)


def test_a_member_equals_the_same_run_alone(alone, tmp_path):
    together(tmp_path, *MEMBERS)
    for name in MEMBERS:
        assert_same_run(alone / name, tmp_path / name)


def test_a_group_costs_the_language_model_passes_of_one_run(tmp_path, monkeypatch):
    calls = {"activations": 0, "predictions": 0}
    for method in calls:
        original = getattr(LanguageModel, method)

        def counting(*args, _method=method, _original=original, **kwargs):
            calls[_method] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(LanguageModel, method, counting)
    together(tmp_path / "one", "topk")
    one = dict(calls)
    together(tmp_path / "three", "topk", "batch_topk", "vanilla")
    assert one["activations"] > 10
    assert calls["activations"] == 2 * one["activations"]
    # Per pass of the evaluation: clean, zero, mean, and one for each SAE and rule; BatchTopK has two rules.
    passes = one["predictions"] // 4
    assert calls["predictions"] == one["predictions"] + passes * (3 + 4)


def test_members_at_different_steps_share_a_pass(alone, tmp_path, monkeypatch):
    """One complete, two stopped at the same step, one new, which the two wait for."""
    together(tmp_path, "topk")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "topk").rglob("*") if p.is_file() and p.suffix != ".log"}
    stop_at_batch(monkeypatch, 7)
    with pytest.raises(Interrupted, match=r"^Stopped by SIGTERM at step 6 of 12, 2 SAEs saved$"):
        together(tmp_path, "batch_topk", "vanilla")
    monkeypatch.undo()
    steps = [torch.load(tmp_path / n / "checkpoints/last.ckpt")["global_step"] for n in ("batch_topk", "vanilla")]
    assert steps == [6, 6]
    assert read_status(tmp_path / "vanilla") == ("interrupted", "step 6/12")
    jobs = [read_job(config(tmp_path / name, *overrides)) for name, overrides in MEMBERS.items()]
    assert [[job.folder.name for job in group] for group in group_by_stream(jobs)] == [
        ["gated", "batch_topk", "vanilla"]
    ]
    refill, refills = ShuffledBlocks._refill, []
    monkeypatch.setattr(
        ShuffledBlocks, "_refill", lambda stream: (refills.append(stream.n_batches_given), refill(stream))
    )
    train_jobs(jobs)
    assert refills == [0, 4, 8, 0]  # one pass of 12 batches in blocks of 4, and the calibration's
    for name in MEMBERS:
        assert_same_run(alone / name, tmp_path / name)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_what_a_group_leaves_is_continued_alone(alone, tmp_path, monkeypatch):
    stop_at_batch(monkeypatch, 7)
    with pytest.raises(Interrupted):
        together(tmp_path, "topk", "batch_topk")
    monkeypatch.undo()
    train_run(config(tmp_path / "batch_topk", *MEMBERS["batch_topk"]))
    assert_same_run(alone / "batch_topk", tmp_path / "batch_topk")


def test_a_member_that_diverges_leaves_and_the_others_go_on(alone, tmp_path):
    together(tmp_path, "topk", "bad", "vanilla")
    status, reason = read_status(tmp_path / "bad")
    assert status == "failed"
    assert "loss" in reason
    assert "lower optimizer.lr" in reason
    for name in ("topk", "vanilla"):
        assert_same_run(alone / name, tmp_path / name)


def test_a_stream_that_breaks_fails_its_own_group_only(alone, tmp_path, monkeypatch):
    draw = ShuffledBlocks.__next__

    def breaking(stream):
        if stream.seed == 1 and stream.n_batches_given == 3:
            raise UserError("shard-00002.safetensors is damaged")
        return draw(stream)

    monkeypatch.setattr(ShuffledBlocks, "__next__", breaking)
    seeds = {"broken": "seed=1", "broken too": "seed=1", "topk": "seed=0"}
    train_jobs([read_job(config(tmp_path / name, *MEMBERS["topk"], seed)) for name, seed in seeds.items()])
    for name in ("broken", "broken too"):
        assert read_status(tmp_path / name) == ("failed", "shard-00002.safetensors is damaged")
    assert_same_run(alone / "topk", tmp_path / "topk")


def test_a_config_that_is_wrong_fails_by_itself(alone, tmp_path):
    jobs = [read_job(config(tmp_path / "topk", *MEMBERS["topk"])), read_job(config(tmp_path / "k", "k=9999"))]
    train_jobs(jobs)
    assert read_status(tmp_path / "k")[1].startswith("k=9999 must lie between 1 and the dictionary's 256 latents")
    assert_same_run(alone / "topk", tmp_path / "topk")


def test_a_job_that_another_process_has_done_meanwhile_is_left_alone(tmp_path):
    job = read_job(config(tmp_path / "topk", *MEMBERS["topk"]))
    assert group_by_stream([job]) == [[job]]
    train_run(config(tmp_path / "topk", *MEMBERS["topk"]))
    before = (tmp_path / "topk" / "metrics.json").stat().st_mtime_ns
    assert train_group([job], None) == []
    assert (tmp_path / "topk" / "metrics.json").stat().st_mtime_ns == before


def test_max_members_splits_a_group(alone, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        together(tmp_path, "topk", "batch_topk", "vanilla", max_members=2)
    assert [r.args[0] for r in caplog.records if "share one pass" in r.msg] == [2, 1]
    assert_same_run(alone / "vanilla", tmp_path / "vanilla")


def test_the_memory_that_is_free_sizes_a_group():
    class OfSize:
        def __init__(self, n: int):
            self.sae = torch.nn.Linear(n, 1, bias=False)

    members = [OfSize(100), OfSize(300)]
    assert has_room([], 0, None)
    assert not has_room(members, 2 * 16 * 700, None)
    assert has_room(members, 2 * 16 * 700 + 2, None)
    assert not has_room(members, 10**9, 2)


def test_each_member_has_a_log_of_its_own(tmp_path):
    root = logging.getLogger()
    hydras = logging.FileHandler(tmp_path / "train.log", delay=True)
    root.addHandler(hydras)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        for name in ("topk", "vanilla"):
            (tmp_path / name).mkdir()
        together(tmp_path, "topk", "vanilla")
    finally:
        root.removeHandler(hydras)
        root.setLevel(level)
    said = {name: (tmp_path / name / "train.log").read_text() for name in ("topk", "vanilla")}
    for name, text in said.items():
        assert f"in {tmp_path / name}\n" in text
        assert text.count(f"training {N_STEPS} steps of 128 tokens at learning rate") == text.count("training") == 1
        assert "2 SAEs share one pass over tiny" in text
    assert not (tmp_path / "train.log").exists()


def test_resume_never_starts_again(alone, tmp_path):
    together(tmp_path, "topk")
    stale = json.loads((tmp_path / "topk" / "metrics.json").read_text())
    train_jobs([read_job(config(tmp_path / "topk", *MEMBERS["topk"], "resume=never", "seed=1"))])
    assert json.loads((tmp_path / "topk" / "metrics.json").read_text()) != stale
