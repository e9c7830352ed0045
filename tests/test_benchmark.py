"""The benchmark runs at a tiny size and writes what it says; how fast anything is, is not tested."""

import itertools
import json
import re

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf
from shell import run

from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.studies import step_cost
from sae_lab.studies.pursuit_cost import benchmark_pursuit
from sae_lab.studies.step_table import StepTable

TINY = ["d_in=16", "n_latents=64", "k=4", "batch_size=32", "repeats=2", "device=cpu"]


def measured(folder, *overrides: str) -> dict:
    done = run(*TINY, *overrides, f"hydra.run.dir={folder}", module="benchmark")
    assert done.returncode == 0, done.stderr
    assert "x floor" in done.stdout
    return json.loads((folder / "benchmark.json").read_text())


@pytest.mark.process
def test_the_command_writes_its_figures(tmp_path):
    figures = measured(tmp_path, "sae=topk", "dead_share=0.25", "precision=bf16-mixed")
    times = ["floor_ms", "torch_floor_ms", "dense_ms", "step_ms", "lightning_step_ms"]
    assert all(figures[name] > 0 for name in (*times, "peak_memory_mb"))
    assert figures["tokens_per_second"] == pytest.approx(1e3 * 32 / figures["step_ms"])
    assert figures["config"]["sae"]["_target_"] == "sae_lab.saes.topk.TopKSAE"
    assert figures["device"]
    assert {p.name for p in tmp_path.iterdir()} <= {"benchmark.json", ".hydra", "benchmark.log"}


@pytest.mark.process
def test_an_sae_without_a_dense_formula_is_timed_without_it(tmp_path):
    figures = measured(tmp_path, "sae=route", "n_sources=2")
    assert figures["dense_ms"] is None
    assert figures["step_ms"] > 0


def test_a_search_is_measured_in_encoder_products_a_step(tmp_path):
    figures = benchmark_pursuit(configured("pursuit=gradient_pursuit", f"run_dir={tmp_path}"))
    ms, ratios = figures["ms"], figures["products_per_step"]
    assert ratios == {name: ms[name] / ms["product"] / 4 for name in ("pursuit", "pursuit without")}
    assert ms["gram matrix"] > 0
    assert json.loads((tmp_path / "benchmark.json").read_text())["ms"] == ms
    with pytest.raises(UserError, match="pursuit=newton is not known: choose one of matching_pursuit"):
        benchmark_pursuit(configured("pursuit=newton", f"run_dir={tmp_path}"))


def test_an_unknown_precision_is_called_as_it_was_typed():
    with pytest.raises(UserError, match=r"^precision=bf16-true is not measured here: choose 32-true or bf16-mixed"):
        step_cost.autocast("bf16-true", torch.zeros(1))


def configured(*overrides: str):
    return compose(*TINY, *overrides, config_name="benchmark")


@pytest.mark.parametrize("name", ["topk", "batch_topk", "vanilla"])
def test_the_dense_reference_computes_what_we_do(name):
    cfg = configured(f"sae={name}", "dead_share=0.25")
    sae, x = step_cost.build_sae(cfg, "cpu"), step_cost.superposed_rows(32, 1, 16)
    ours, dense = sae(x), step_cost.dense_forward(sae, x)
    torch.testing.assert_close(dense.x_hat, ours.x_hat)
    assert sae.dead().sum() == (16 if "k" in sae.config else 0)
    code = ours.code.to_dense() if isinstance(ours.code, SparseCode) else ours.code
    torch.testing.assert_close(dense.code, code)


def test_a_step_of_the_reference_is_a_step_of_ours():
    cfg = configured("sae=batch_topk", "dead_share=0.25")
    x = step_cost.superposed_rows(32, 1, 16)
    trained = []
    for forward in ({}, {"forward": step_cost.dense_forward}):
        sae = step_cost.build_sae(cfg, "cpu")
        before = sae.W_enc.clone()
        step = step_cost.training_step(sae, cfg, x, **forward)
        for _ in range(3):
            step()
        assert not torch.equal(sae.W_enc, before)
        trained.append(sae.state_dict())
    for name, ours in trained[0].items():
        torch.testing.assert_close(ours, trained[1][name])


def test_steps_follow_each_other_before_the_host_waits_for_a_gpu(monkeypatch, tmp_path):
    """Here a CPU stands in for it, and each look at the clock takes a second."""
    monkeypatch.setitem(step_cost.AT_ONCE, "cpu", 4)
    looks, taken = itertools.count(), []
    monkeypatch.setattr(step_cost, "synchronized_time", lambda device: next(looks))
    cfg = configured("sae=topk", f"run_dir={tmp_path}")
    x, sae = step_cost.superposed_rows(32, 1, 16), step_cost.build_sae(cfg, "cpu")
    times = step_cost.time_interleaved({"step": lambda: taken.append(int(sae.steps))}, sae, cfg, x)
    assert times == {"step": 250.0, "lightning_step": 250.0}
    rounds = len(taken) // 4
    assert taken == [max(0, 4 * i - 1) for i in range(rounds) for _ in range(4)]  # Lightning holds one batch ahead
    assert sae.steps == 4 * rounds


def test_a_sweep_of_sizes_ends_in_one_table(capsys, tmp_path):
    for i, size in enumerate(("gpt2_x4", "gemma2_2b_x16")):
        cfg = compose(f"size={size}", config_name="benchmark")
        figures = {"floor_ms": 2.0, "step_ms": 3.0, "lightning_step_ms": 3.5, "peak_memory_mb": 2048.0}
        figures |= {"tokens_per_second": 1e6 + i, "device": "a GPU", "config": OmegaConf.to_container(cfg)}
        folder = tmp_path / size
        folder.mkdir()
        (folder / "benchmark.json").write_text(json.dumps(figures))
    StepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    shown = capsys.readouterr().out
    rows = [re.findall(r"[\w.,]+", line) for line in shown.splitlines() if "BatchTopK" in line]
    assert rows == [
        ["BatchTopK", "768", "3,072", "16", "2.000", "3.000", "1.50", "3.500", "1,000,000", "2.0"],
        ["BatchTopK", "2,304", "36,864", "64", "2.000", "3.000", "1.50", "3.500", "1,000,001", "2.0"],
    ]
