"""bench/quality: the rows that other libraries train on, what they are given to train, and the judge of all systems."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import torch
from conftest import build, planted

from sae_lab.evaluation.metrics import ReconstructionMetrics

FOLDER = Path(__file__).parent.parent / "bench" / "quality"
MODULES = ("coding", "judge", "ours", "peers", "rows", "table")


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/quality, which are no package: its other environment has no sae_lab."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def test_rows_on_disk_are_the_batches_of_training(bench, tmp_path):
    data = fakes.data()
    bench.rows.write_training_rows(data, tmp_path / "train.npy")
    batches = list(bench.coding.Rows(tmp_path / "train.npy", data.batch_size))
    assert torch.equal(torch.cat(batches), torch.cat([x.flatten(1) for x in fakes.data().train_dataloader()]).float())
    assert len(batches) == data.n_steps
    batches[0].zero_()  # as a trainer may
    assert next(iter(bench.coding.Rows(tmp_path / "train.npy", data.batch_size))).any()


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "jumprelu"])
def test_the_judge_agrees_with_the_metrics(bench, name, tmp_path):
    sae, x = build(name), planted(300)[0]
    sae.train()
    sae(x)  # sets the threshold
    rows = x.squeeze(1)
    bench.coding.write_all(tmp_path, {}, bench.ours.coder_in(sae, False), bench.ours.coder_in(sae, True), rows, 128)
    model = SimpleNamespace(mean_ce=lambda x_hat: x_hat.sum().item(), clean=0.0)
    row = bench.judge.judge(tmp_path, rows, model)
    metrics = ReconstructionMetrics(sae.n_latents)
    x_hat, code = sae.eval().autoencode(x)
    metrics.update(x, x_hat, code, sae.predicted_mask(x))
    expected = metrics.compute()
    assert row["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)
    assert (row["l0"], row["dead"]) == pytest.approx((expected["l0"], expected["dead_fraction"]), rel=1e-6)
    assert row["ce_degradation"] == pytest.approx(x_hat.sum().item(), rel=1e-3)
    if sae.batch_rule:
        assert row["l0_trained"] == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("n_latents", [64, 100, 20])
def test_peers_get_the_groups_of_our_matryoshka(bench, n_latents):
    size = bench.peers.size_of(16, n_latents, 4)
    sizes = build("matryoshka", n_latents=n_latents).sizes
    assert size["prefixes"] == np.cumsum(sizes).tolist()
    assert [round(share * n_latents) for share in size["group_fractions"]] == sizes


def test_the_table_has_the_means_over_seeds(bench, tmp_path, capsys, monkeypatch):
    names = "system,family,rate,seed,settings,n_tokens,cpu_seconds,fvu,l0,fvu_trained,l0_trained,dead,ce_degradation"
    lines = [f"{system},topk,default,{seed},x,1,,{fvu},4,{fvu},4,0,0.1" for system, seed, fvu in
             (("SAELens", 0, 0.4), ("SAELens", 1, 0.2), ("SAE Lab", 0, 0.1))]  # fmt: skip
    (tmp_path / "results.csv").write_text("\n".join([names, *lines]))
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "results.csv")])
    bench.table.main()
    ours, theirs = capsys.readouterr().out.splitlines()[2:]
    assert ours.startswith("| TopK | **SAE Lab** | default | x | 1 | 0.1000 |")
    assert theirs.startswith("| TopK | SAELens | default | x | 2 | 0.3000 |")
