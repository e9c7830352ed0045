"""Runs on activations of files: what they find, that they continue and share a pass to the bit, what they write."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import compose, planted
from groups import assert_same_run, stop_at_batch
from safetensors.torch import save_file
from shell import run
from small_runs import assert_continues_to_the_bits_of, assert_one_sentence

from sae_lab import load_run, load_sae
from sae_lab.runs.export import export_sae
from sae_lab.runtime.errors import SafeStop, UserError
from sae_lab.sweeps.shared_stream import train_jobs
from sae_lab.sweeps.table import collect_table
from sae_lab.training.job import read_job
from sae_lab.training.run import train_run

N_STEPS = 12
SMALL = [
    "data=tensor",
    f"n_tokens={N_STEPS * 128}",
    "batch_size=128",
    "k=3",
    "expansion=2",
    "data.block_tokens=512",
    "data.n_eval_tokens=280",
    "data.n_val_tokens=128",
    "calibration_batches=3",
    "trainer.validate_every=5",
    "trainer.checkpoint_every=4",
    "trainer.log_every=3",
]


@pytest.fixture(scope="module")
def acts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("acts")
    torch.save(planted(4000)[0][:, 0].clone(), folder / "acts.pt")
    return folder / "acts.pt"


def config(folder: Path, acts: Path, *overrides: str):
    return compose(*SMALL, f"data.path={acts}", *overrides, f"run_dir={folder}")


@pytest.fixture(scope="module")
def whole(acts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_run(config(folder, acts))
    return folder


def test_a_planted_dictionary_is_recovered_from_a_file(tmp_path):
    x, directions = planted(20_000)
    file = tmp_path / "acts.safetensors"
    save_file({"acts": x[:, 0].clone()}, file)
    long = ["n_tokens=100_000", "data.block_tokens=20_000", "optimizer.lr=3e-3", "sae.normalize=none"]
    train_run(config(tmp_path / "run", file, *long))
    decoder = torch.nn.functional.normalize(load_sae(tmp_path / "run").directions()[:, 0], dim=-1)
    best = (directions[:, 0] @ decoder.T).max(dim=1).values
    assert (best > 0.9).float().mean() > 0.8


def test_metrics_of_reconstruction_are_written_and_the_reason_for_the_others(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert {"fvu", "nmse", "l0", "l0_std", "cosine_similarity", "dead_fraction"} < metrics.keys()
    assert metrics["n_eval_tokens"] == 280
    assert metrics["left_out"] == dict.fromkeys(
        ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl", "ce_degradation", "loss_recovered"),
        "there is no language model",
    )
    assert not any(name.startswith("ce_") for name in (*metrics, *metrics["train_mode"]))
    said = json.loads((whole / "sae" / "config.json").read_text())["provenance"]
    assert (said["model"]["name"], said["sites"], said["tokenizer"], said["bos"]) == (None, ["acts"], None, None)


def test_a_run_that_is_stopped_continues_to_the_same_bits(whole, acts, tmp_path, monkeypatch):
    stop_at_batch(monkeypatch, 8)
    with pytest.raises(SafeStop):
        train_run(config(tmp_path, acts))
    monkeypatch.undo()
    train_run(config(tmp_path, acts))
    assert_same_run(whole, tmp_path)


def test_members_of_a_group_equal_the_runs_alone(acts, tmp_path):
    choices = (["sae=topk"], ["k=2"])
    jobs = [read_job(config(tmp_path / f"group{i}", acts, *choice)) for i, choice in enumerate(choices)]
    train_jobs(jobs)
    for i, choice in enumerate(choices):
        train_run(config(tmp_path / f"alone{i}", acts, *choice))
        assert_same_run(tmp_path / f"alone{i}", tmp_path / f"group{i}")
    table = collect_table(tmp_path)
    assert set(table["status"]) == {"complete"}
    assert table["fvu"].notna().all()


def test_files_may_move_but_not_change(whole, acts, tmp_path):
    cfg = config(tmp_path / "run", acts)
    train_run(cfg)
    sae, data, _ = load_run(tmp_path / "run", "cpu")
    assert torch.equal(sae.encode(data.probe_rows()), load_sae(whole).encode(data.probe_rows()))
    other = tmp_path / "acts.pt"
    torch.save(torch.load(acts) + 1, other)
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(UserError, match="the activations changed since this run began"):
        train_run(config(tmp_path / "run", other))


def test_other_libraries_get_the_sae(whole, tmp_path):
    export_sae(whole, "sae_lens", tmp_path / "exported")
    assert load_sae(tmp_path / "exported").d_in == 16
    assert "# BatchTopKSAE of acts\n" in (tmp_path / "exported" / "README.md").read_text()


def test_several_sources_train_a_crosscoder(tmp_path):
    torch.save(planted(2000, n_sources=2)[0], tmp_path / "acts.pt")
    metrics = train_run(config(tmp_path / "run", tmp_path / "acts.pt", "data.axes=nsd"))
    assert {"fvu_0", "fvu_1", "fvu"} < metrics.keys()
    assert metrics["fvu"] < 1


@pytest.mark.process
def test_a_killed_command_continues_to_the_same_bits(acts, tmp_path):
    dials = [*SMALL, f"data.path={acts}", "n_tokens=12_800", "trainer.checkpoint_every=25", "data.prefetch=true"]
    done = run(*dials, f"hydra.run.dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    assert_continues_to_the_bits_of(tmp_path / "whole", tmp_path / "killed", dials, signal.SIGTERM, 100)


@pytest.mark.process
def test_a_command_without_axes_says_what_to_type(tmp_path):
    torch.save(torch.zeros(10, 20, 4), tmp_path / "acts.pt")
    done = run("data=tensor", f"data.path={tmp_path / 'acts.pt'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert_one_sentence(done, "has shape (10, 20, 4): type data.axes=nsd if axis 1 is sites")
