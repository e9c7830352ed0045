"""Launchers on other engines: how many jobs run at once, where their files land, and what to install."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from shell import run
from test_sweep import arguments, sweep

from sae_lab.runtime.errors import UserError
from sae_lab.sweeps.gpus import count_slots, run_on_ray, split_groups
from sae_lab.sweeps.status import job_folders, planned_jobs, read_status

PRESETS = {
    "hydra/launcher=gpus": ("hydra_ray_launcher", "ray"),
    "hydra/launcher=slurm": ("hydra_submitit_launcher", "slurm"),
    "hydra/sweeper=search": ("hydra_optuna_sweeper", "optuna"),
}


def installed(plugin: str) -> bool:
    return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None


def needs(plugin: str):
    return pytest.mark.skipif(
        not installed(plugin), reason=f"{plugin} is an extra with a virtual environment of its own"
    )


@pytest.mark.process
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_is_not_installed_names_its_extra(preset):
    plugin, extra = PRESETS[preset]
    if installed(plugin):
        pytest.skip(f"{plugin} is installed")
    done = run("-m", preset, "k=3,4")
    assert done.returncode == 1
    sentence = f"train: {preset} needs a package that is not installed: pip install 'sae-lab[{extra}]'."
    assert done.stderr.splitlines() == [sentence]


def test_groups_are_dealt_to_slots():
    """A group is cut only where slots would be idle."""

    def split(groups: list[str], slots: int) -> list[str]:
        jobs = [
            [SimpleNamespace(name=name, sites=("b" if name.isupper() else "a",)) for name in group] for group in groups
        ]
        return ["".join(job.name for job in part) for part in split_groups(jobs, slots)]  # type: ignore[arg-type]

    assert split(["abcde"], 2) == ["ace", "bd"]
    assert split(["ab", "c"], 4) == ["a", "b", "c"]
    assert split(["ab", "c", "d"], 2) == ["ab", "c", "d"]
    assert split(["aAbBcCdD"], 2) == ["abcd", "ABCD"]  # jobs of the same sites stay together
    assert split([], 2) == []


def test_parallel_is_a_number_of_groups(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_slots("auto") == 1
    for wrong in (0, "two", 1.5, True):
        with pytest.raises(UserError, match=f"hydra.launcher.parallel={wrong} must be auto or a whole number"):
            count_slots(wrong)
    monkeypatch.setattr("sae_lab.sweeps.gpus.ray_is_installed", lambda: False)
    with pytest.raises(UserError, match=r"parallel=2 needs Ray, .*: pip install 'sae-lab\[ray\]'\."):
        count_slots(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_slots("auto") == 1
    assert caplog.messages == [
        "Using one of 4 GPUs, because Ray is not installed: pip install 'sae-lab[ray]' to use all of them."
    ]
    monkeypatch.setattr("sae_lab.sweeps.gpus.ray_is_installed", lambda: True)
    assert count_slots("auto") == 4


def at_once(folders: list[Path], logs: list[str]) -> int:
    """How many jobs were at work at a time, from a log's first line to the folder's last file."""
    begins = pd.to_datetime([log.splitlines()[0][1:24] for log in logs], format="%Y-%m-%d %H:%M:%S,%f")
    last = [next(f / name for name in ("metrics.json", "failed.txt") if (f / name).is_file()) for f in folders]
    ends = pd.to_datetime([file.stat().st_mtime for file in last], unit="s")
    return max(sum(b <= begin < e for b, e in zip(begins, ends, strict=True)) for begin in begins)


def assert_sweep_of_four(root: Path, done: subprocess.CompletedProcess[str], slots: int) -> None:
    """Every job in its folder, never more than `slots` at a time; the one that diverged is told, and no other."""
    assert done.returncode == 1, done.stderr
    folders = planned_jobs(root / "sweep")
    assert [read_status(folder)[0] for folder in folders] == ["complete", "failed"] * 2, done.stderr
    assert all("training has diverged" in read_status(folder)[1] for folder in folders[1::2])
    assert "4 jobs: 2 complete, 2 failed." in done.stdout
    assert all((folder / "sae" / "sae.safetensors").is_file() for folder in folders[::2])
    logs = [(folder / "train.log").read_text() for folder in folders]
    assert all(f"training 16 steps of 128 tokens in {f}" in log for f, log in zip(folders, logs, strict=True))
    assert at_once(folders, logs) <= slots


def assert_continues(root: Path, *overrides: str) -> None:
    """The command without its bad jobs finds the good ones complete, and leaves them as they are."""
    folders = planned_jobs(root / "sweep")[::2]
    before = {p: p.stat().st_mtime_ns for f in folders for p in f.rglob("*") if p.suffix not in (".log", ".lock")}
    again = sweep(root, *overrides, "optimizer.lr=1e-3", shell=True)
    assert again.returncode == 0, again.stderr
    assert "2 jobs: 2 complete." in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


JOBS = ["sae=vanilla", "k=4,8"]
"""With two learning rates, of which one diverges."""
BAD = "optimizer.lr=1e-3,1e30"


def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch):
    def init(**options):
        raise ConnectionError("no head node at 10.0.0.1\nand more")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"^Ray does not start \(no head node at 10\.0\.0\.1\): .*parallel=1\.$"):
        run_on_ray([], 2, None, None)


@needs("hydra_ray_launcher")
def test_ray_gives_each_job_its_slot(tmp_path):
    """Two pretend slots: processors in place of GPUs."""
    remote = ["hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=1"]
    ours = [*JOBS, "hydra/launcher=gpus", *remote, "+hydra.launcher.ray.init.num_cpus=2"]
    assert_sweep_of_four(tmp_path, sweep(tmp_path, *ours, BAD, shell=True), slots=2)
    assert_continues(tmp_path, *ours)


@needs("hydra_ray_launcher")
def test_groups_share_a_stream_each_in_its_slot(tmp_path):
    """Four jobs of one stream in two slots are two groups."""
    ours = [*JOBS, "hydra/launcher=shared_stream", "hydra.launcher.parallel=2"]
    done = sweep(tmp_path, *ours, BAD, shell=True)
    assert_sweep_of_four(tmp_path, done, slots=4)
    assert "2 groups, 2 at a time" in done.stderr
    folders = planned_jobs(tmp_path / "sweep")
    assert all("2 SAEs share one pass over tiny" in (f / "train.log").read_text() for f in folders)
    assert_continues(tmp_path, *ours)


@needs("hydra_ray_launcher")
def test_a_signal_reaches_every_group_which_saves(tmp_path):
    ours = ["sae=vanilla", "k=4,8", "hydra/launcher=shared_stream", "hydra.launcher.parallel=2"]
    endless = ["n_tokens=1_000_000_000", "trainer.checkpoint_every=1_000_000"]
    command = [sys.executable, "-m", "sae_lab.train", *arguments(tmp_path, *ours, *endless)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("sweep/*/metrics.csv"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert [read_status(folder)[0] for folder in planned_jobs(tmp_path / "sweep")] == ["interrupted"] * 2, said
    assert all((folder / "checkpoints" / "last.ckpt").is_file() for folder in planned_jobs(tmp_path / "sweep")), said


@needs("hydra_submitit_launcher")
def test_submitit_runs_each_job_in_its_folder(tmp_path):
    ours = [*JOBS, "hydra/launcher=submitit_local"]
    assert_sweep_of_four(tmp_path, sweep(tmp_path, *ours, BAD, shell=True), slots=4)
    assert_continues(tmp_path, *ours)


@needs("hydra_optuna_sweeper")
def test_a_search_minimises_its_score_and_continues(tmp_path):
    """What a trial that fails costs the search is itself; the same command makes the same choices."""
    over = ["optimizer.lr=1e-3,1e30", "k=interval(4,32)", "hydra.sweeper.n_trials=4"]
    done = sweep(tmp_path, "hydra/sweeper=search", *over, shell=True)
    folders = job_folders(tmp_path / "sweep")
    status = [read_status(folder)[0] for folder in folders]
    assert len(status) == 4, done.stderr
    assert set(status) == {"complete", "failed"}, done.stdout
    assert done.returncode == 1
    fvu = [json.loads(f.read_text())["fvu"] for f in (tmp_path / "sweep").glob("*/metrics.json")]
    assert f" and fvu {min(fvu):.4f}:\npython -m sae_lab.train " in done.stdout
    again = sweep(tmp_path, "hydra/sweeper=search", *over, shell=True)
    assert job_folders(tmp_path / "sweep") == folders, again.stdout


@needs("hydra_optuna_sweeper")
def test_a_search_whose_jobs_all_fail_ends_in_one_sentence(tmp_path):
    done = sweep(tmp_path, "hydra/sweeper=search", "hydra.sweeper.n_trials=2", "k=choice(1000,2000)")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "train: no job of this search was completed: see each job's failed.txt"
    )
    assert {read_status(folder)[0] for folder in job_folders(tmp_path / "sweep")} == {"failed"}
