"""Presets on other engines: how many jobs run at once, where their files land, and what to install."""

import importlib.util
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from shell import run
from test_sweep import SMALL

from sae_lab.sweep import plan, standing

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


def sweep(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    (root / "experiment").mkdir()
    (root / "experiment" / "small.yaml").write_text(SMALL)
    where = [f"--config-dir={root}", "-m", "experiment=small", f"hydra.sweep.dir={root / 'sweep'}"]
    return run(*where, *overrides, shell=True)  # Ray's and submitit's workers start as this process did


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_is_not_installed_names_its_extra(preset):
    plugin, extra = PRESETS[preset]
    if installed(plugin):
        pytest.skip(f"{plugin} is installed")
    done = run("-m", preset, "k=3,4")
    assert done.returncode == 1
    sentence = f"train: {preset} needs a package that is not installed: pip install 'sae-lab[{extra}]'."
    assert done.stderr.splitlines() == [sentence]


def assert_sweep_of_four(root: Path, done: subprocess.CompletedProcess[str], at_once: int) -> None:
    """Every job in its folder, complete, and never more than `at_once` between a log's first and last line."""
    assert done.returncode == 0, done.stderr
    folders = plan(root / "sweep")
    assert [standing(folder)[0] for folder in folders] == ["complete"] * 4
    assert all((folder / "sae" / "sae.safetensors").is_file() for folder in folders)
    logs = [(folder / "train.log").read_text().splitlines() for folder in folders]
    begins = pd.to_datetime([lines[0][1:24] for lines in logs], format="%Y-%m-%d %H:%M:%S,%f")
    ends = pd.to_datetime([(folder / "metrics.json").stat().st_mtime for folder in folders], unit="s")
    assert max(sum(b <= begin < e for b, e in zip(begins, ends, strict=True)) for begin in begins) <= at_once


@needs("hydra_ray_launcher")
def test_ray_gives_each_job_its_slot(tmp_path):
    """Two pretend slots: processors in place of GPUs."""
    remote = ["hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=1"]
    done = sweep(
        tmp_path, "k=4,8", "sae=topk,vanilla", "hydra/launcher=gpus", *remote, "+hydra.launcher.ray.init.num_cpus=2"
    )
    assert_sweep_of_four(tmp_path, done, at_once=2)


@needs("hydra_submitit_launcher")
def test_submitit_runs_each_job_in_its_folder(tmp_path):

    done = sweep(tmp_path, "k=4,8", "sae=topk,vanilla", "hydra/launcher=submitit_local")
    assert_sweep_of_four(tmp_path, done, at_once=4)


@needs("hydra_optuna_sweeper")
def test_a_search_minimises_its_score(tmp_path):
    over = "sae.l1_coefficient=tag(log,interval(1e-4,1e-1))"
    done = sweep(tmp_path, "hydra/sweeper=search", "sae=vanilla", "goal_l0=16", "hydra.sweeper.n_trials=3", over)
    assert done.returncode == 0, done.stderr
    assert "3 jobs: 3 complete." in done.stdout
    assert "Best parameters" in done.stdout + done.stderr
