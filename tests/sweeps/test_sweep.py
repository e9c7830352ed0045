"""What a sweep's folder says of its jobs, and what a failing job costs the others."""

import subprocess
from pathlib import Path

import hydra
import kill_sweep
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from shell import run

from sae_lab.cli.folder_names import folder_name, leave_out_constants
from sae_lab.cli.help import CONF
from sae_lab.runs.folder import Run
from sae_lab.runtime.errors import FolderInUse, UserError
from sae_lab.sweeps.failures import failure_recorded
from sae_lab.sweeps.status import (
    count_statuses,
    drop_shared_overrides,
    job_folders,
    job_statuses,
    planned_jobs,
    read_status,
)
from sae_lab.sweeps.summary import plan_job_names

SMALL = """# @package _global_
n_tokens: 2048
batch_size: 128
seq_len: 32
expansion: 2
calibration_batches: 2
data: {block_tokens: 512, n_eval_tokens: 256, n_val_tokens: 128}
trainer: {log_every: 3, validate_every: 10}
"""


def arguments(root: Path, *overrides: str) -> list[str]:
    """The command line of a sweep of small runs into root/sweep."""
    (root / "experiment").mkdir(exist_ok=True)
    (root / "experiment" / "small.yaml").write_text(SMALL)
    small = [f"--config-dir={root}", "-m", "experiment=small", f"hydra.sweep.dir={root / 'sweep'}"]
    return [*small, *overrides]


def sweep(root: Path, *overrides: str, shell: bool = False) -> subprocess.CompletedProcess[str]:
    return run(*arguments(root, *overrides), shell=shell)


def leave_run(folder: Path, n_logged: int = 0, rate: float = 50.0) -> Run:
    """A run folder as an interrupted run leaves it: 101 steps of 10 tokens, the last of 5; `n_logged` in the log."""
    run = Run(folder, 0, False)
    config = OmegaConf.create({"n_tokens": 1005, "batch_size": 10})
    with run.begin({"config.yaml": OmegaConf.to_yaml(config)}):
        rows = [f"{step},{rate}" for step in range(n_logged)]
        (folder / "metrics.csv").write_text("\n".join(["step,tokens_per_second", *rows, ""]))
    return run


def leave_checkpoint(run: Run, step: int) -> None:
    run.last_checkpoint.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step}, run.last_checkpoint)


def test_status(tmp_path):
    for name in ("complete", "failed", "interrupted"):
        leave_checkpoint(leave_run(tmp_path / name, n_logged=20), step=24)  # which is where the run would go on
    (tmp_path / "complete" / "metrics.json").write_text("{}")
    (tmp_path / "failed" / "failed.txt").write_text("out of memory\n\nTraceback ...\n")
    running = leave_run(tmp_path / "running")
    with running.begin({"config.yaml": "{n_tokens: 1000, batch_size: 10}"}):
        (tmp_path / "running" / "metrics.csv").write_text("step,tokens_per_second\n9,20\n19,50\n")
        names = ["complete", "failed", "interrupted", "running", "waiting"]
        assert job_statuses(tmp_path, [tmp_path / name for name in names]) == [
            ("complete", "complete", ""),
            ("failed", "failed", "out of memory"),
            ("interrupted", "interrupted", "step 24/101"),
            ("running", "running", "step 20/100, 0:00:16 left"),
            ("waiting", "waiting", ""),
        ]


def test_a_failure_is_kept_with_its_reason_and_cleared_by_the_next_attempt(tmp_path):
    with failure_recorded(tmp_path):
        raise UserError("k=0 is too small: raise k.")
    assert (tmp_path / "failed.txt").read_text() == "k=0 is too small: raise k.\n"
    with failure_recorded(tmp_path):
        raise RuntimeError("CUDA out of\nmemory")
    assert read_status(tmp_path) == ("failed", "RuntimeError: CUDA out of memory")
    assert "Traceback" in (tmp_path / "failed.txt").read_text()
    with failure_recorded(tmp_path):
        assert not (tmp_path / "failed.txt").exists()


def test_a_job_that_another_process_runs_has_not_failed(tmp_path):
    with failure_recorded(tmp_path):
        raise FolderInUse("another process trains here")
    assert not (tmp_path / "failed.txt").exists()


def test_an_interruption_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), failure_recorded(tmp_path):
        raise KeyboardInterrupt
    assert not (tmp_path / "failed.txt").exists()


def test_job_folders_count_as_people_do_and_know_what_failed_before_it_began(tmp_path):
    for name in ("k=10", "k=2", "lr=0.5", "lr=0.25"):
        leave_run(tmp_path / name)
    (tmp_path / "k=1").mkdir()
    (tmp_path / "k=1" / "failed.txt").write_text("no\n")
    assert [f.name for f in job_folders(tmp_path)] == ["k=1", "k=2", "k=10", "lr=0.25", "lr=0.5"]


def test_names_are_shown_without_what_they_share():
    assert drop_shared_overrides(["k=8,lr=1,sae=topk", "k=16,lr=1,sae=topk", "k=8,lr=1,sae=gated"]) == [
        "k=8,sae=topk",
        "k=16,sae=topk",
        "k=8,sae=gated",
    ]
    assert drop_shared_overrides(["k=8"]) == ["k=8"]
    assert drop_shared_overrides(["k=8,lm.sites=[a,b]", "k=8,lm.sites=[a,c]"]) == ["lm.sites=[a,b]", "lm.sites=[a,c]"]


def test_long_folder_names_stay_different():
    names = {folder_name("a" * 300 + end) for end in "xyz"}
    assert len(names) == 3
    assert all(len(name) == 200 for name in names)


@pytest.mark.process
@pytest.mark.parametrize("launcher", ["basic", "shared_stream"])
def test_one_bad_job_costs_the_others_nothing(tmp_path, launcher):
    """Two diverge and two complete, which the next command does not train again."""
    jobs = ["sae=vanilla", "k=4,8", "optimizer.lr=1e-3,1e30", f"hydra/launcher={launcher}"]
    done = sweep(tmp_path, *jobs)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    folders = planned_jobs(tmp_path / "sweep")
    assert [f.name.split(",") for f in folders] == [
        [f"k={k}", f"optimizer.lr={lr}"] for k in (4, 8) for lr in ("0.001", "1e+30")
    ]
    assert [read_status(f)[0] for f in folders] == ["complete", "failed"] * 2
    assert "4 jobs: 2 complete, 2 failed." in done.stdout
    assert "training has diverged" in read_status(folders[1])[1]
    assert "training has diverged" in (folders[1] / "train.log").read_text()
    before = {p: p.stat().st_mtime_ns for f in folders[::2] for p in f.rglob("*") if p.suffix not in (".log", ".lock")}
    jobs[2] = "optimizer.lr=1e-3"
    again = sweep(tmp_path, *jobs)
    assert again.returncode == 0, again.stderr
    assert "2 jobs: 2 complete." in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_plan_has_the_folders_that_hydra_will_make(tmp_path):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        typed = ["-m", "sae=topk,gated", "k=3,4", "resume=auto", "lm.sites=[a/b]", f"hydra.sweep.dir={tmp_path}"]
        _, *overrides = leave_out_constants(typed)
        config = GlobalHydra.instance().hydra.compose_config("train", overrides, run_mode=RunMode.MULTIRUN)
        assert plan_job_names(config) == [
            f"k={k},lm.sites=[a_b],sae={sae}" for sae in ("topk", "gated") for k in (3, 4)
        ]
        config.hydra.sweep.subdir = "${hydra:job.num}"
        assert plan_job_names(config) == ["0", "1", "2", "3"]
        config.hydra.sweeper._target_ = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
        assert plan_job_names(config) == []


@pytest.mark.process
@pytest.mark.parametrize("launcher", ["basic", "shared_stream"])
def test_a_sweep_that_is_killed_ends_equal_to_the_bit(tmp_path, launcher):
    assert kill_sweep.main(tmp_path, kills=2, launcher=launcher)


def test_counted(tmp_path):
    leave_run(tmp_path / "a")
    assert (
        count_statuses(job_statuses(tmp_path, [tmp_path / "a", tmp_path / "b"])) == "2 jobs: 1 interrupted, 1 waiting."
    )
    assert count_statuses(job_statuses(tmp_path, [tmp_path / "a"])) == "1 job: 1 interrupted."
