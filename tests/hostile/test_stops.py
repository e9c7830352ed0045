"""Stops at the worst moments: nothing that was trained is lost, and the same command ends in the same bits."""

import gc
import logging
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import data
from groups import N_STEPS, SMALL, assert_same_run, config, stop_at_batch
from shell import run

import sae_lab.training.run
from sae_lab.activations.source import LMSource
from sae_lab.cache.writer import CacheWriter
from sae_lab.cli.folder_names import new_folder
from sae_lab.runs import results
from sae_lab.runtime.errors import Interrupted, SafeStop
from sae_lab.runtime.signals import raise_interrupted
from sae_lab.sweeps.shared_stream import train_jobs
from sae_lab.sweeps.status import planned_jobs
from sae_lab.training.job import read_job
from sae_lab.training.module import SAEModule
from sae_lab.training.run import train_run

MEMBERS = {
    "topk": ["sae=topk", "k=4"],
    "batch_topk": ["sae=batch_topk", "k=8", "trainer.checkpoint_every=5"],
    "vanilla": ["sae=vanilla", "n_latents=100"],
}
HUP, USR1, USR2, TERM = signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM


def group(root: Path) -> None:
    train_jobs([read_job(config(root / name, *overrides)) for name, overrides in MEMBERS.items()])


def single(root: Path) -> None:
    train_run(config(root / "topk", *MEMBERS["topk"]))


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    """Most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = {name: lambda *table_and_path, **_: table_and_path[-1] for name in results.plots.__all__}
        patch.setattr(results, "plots", SimpleNamespace(**drawn))
        yield


@pytest.fixture(scope="module", autouse=True)
def _hangup():
    """SIGHUP as a shell leaves it, also for a suite that runs under nohup, where it is ignored."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The group, never stopped. (A run alone ends in the same bits: see test_group.)"""
    root = tmp_path_factory.mktemp("whole")
    group(root)
    return root


def send_at(monkeypatch, owner: Any, name: str, call: int, signum: signal.Signals) -> Callable[[], int]:
    """Send a signal to this process at the n-th call of a method; a function returns how often it has been called."""
    calls, real, made = count(1), getattr(owner, name), [0]

    def sending(*args, **kwargs):
        made[0] = next(calls)
        if made[0] == call:
            os.kill(os.getpid(), signum)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, sending)
    return lambda: made[0]


def saved_steps(root: Path) -> list[int]:
    return [torch.load(f, weights_only=True)["global_step"] for f in sorted(root.glob("*/checkpoints/last.ckpt"))]


def assert_ends_like(whole: Path, root: Path) -> None:
    for folder in root.iterdir():
        assert_same_run(whole / folder.name, folder)


@pytest.mark.parametrize("member", range(1, len(MEMBERS) + 1))
def test_a_signal_at_the_end_of_a_members_training_waits_until_all_have_saved(whole, tmp_path, monkeypatch, member):
    send_at(monkeypatch, SAEModule, "on_train_end", member, TERM)
    with pytest.raises(SafeStop, match="Stopped by SIGTERM at step 12 of 12, 3 SAEs saved"):
        group(tmp_path)
    monkeypatch.undo()
    assert saved_steps(tmp_path) == [N_STEPS] * len(MEMBERS)
    group(tmp_path)
    assert_ends_like(whole, tmp_path)


@pytest.mark.parametrize("signum", [HUP, USR1, USR2, TERM])
def test_a_run_stops_where_a_batch_is_asked_for(whole, tmp_path, monkeypatch, signum):
    stop_at_batch(monkeypatch, 7, signum)
    with pytest.raises(SafeStop, match=f"Stopped by {signum.name} at step 6 of 12, saved as"):
        single(tmp_path)
    monkeypatch.undo()
    single(tmp_path)
    assert_ends_like(whole, tmp_path)


def test_a_run_that_has_taken_its_last_step_saves_it(whole, tmp_path, monkeypatch):
    send_at(monkeypatch, SAEModule, "on_train_end", 1, USR1)
    with pytest.raises(SafeStop, match="Stopped by SIGUSR1"):
        single(tmp_path)
    monkeypatch.undo()
    assert saved_steps(tmp_path) == [N_STEPS]
    single(tmp_path)
    assert_ends_like(whole, tmp_path)


@pytest.mark.parametrize(("train", "signum"), [(single, HUP), (group, USR2)])
def test_a_block_that_is_being_filled_is_left_after_the_current_chunk(whole, tmp_path, monkeypatch, train, signum):
    """Four chunks and four batches to a block: the signal arrives in the second block's second chunk."""
    chunks = send_at(monkeypatch, LMSource, "_read", 6, signum)
    with pytest.raises(SafeStop, match=f"Stopped by {signum.name}"):
        train(tmp_path)
    assert chunks() == 6
    monkeypatch.undo()
    assert set(saved_steps(tmp_path)) == {4}
    train(tmp_path)
    assert_ends_like(whole, tmp_path)


def test_a_block_after_a_validation_is_left_with_that_validation_logged_once(whole, tmp_path, monkeypatch):
    """Validated after every block of four batches, and stopped in the block after the second validation."""
    for name in ("whole", "topk"):
        overrides = [*MEMBERS["topk"], "trainer.validate_every=4"]
        if name == "topk":
            send_at(monkeypatch, LMSource, "_read", 10, TERM)
            with pytest.raises(SafeStop, match="at step 8 of 12"):
                train_run(config(tmp_path / name, *overrides))
            monkeypatch.undo()
        train_run(config(tmp_path / name, *overrides))
    assert_same_run(tmp_path / "whole", tmp_path / "topk")


@pytest.mark.parametrize(
    ("train", "name"), [(single, "calibrate"), (single, "evaluate_all"), (group, "save_sae"), (group, "print_metrics")]
)
def test_a_signal_after_training_leaves_checkpoints(whole, tmp_path, monkeypatch, train, name):
    before = signal.signal(TERM, raise_interrupted)  # as an entry point does
    try:
        send_at(monkeypatch, sae_lab.training.run, name, 1, TERM)
        with pytest.raises(Interrupted, match="Stopped by SIGTERM"):
            train(tmp_path)
    finally:
        signal.signal(TERM, before)
        monkeypatch.undo()
    assert set(saved_steps(tmp_path)) == {N_STEPS}
    train(tmp_path)
    assert_ends_like(whole, tmp_path)


@pytest.mark.parametrize("signum", [HUP, USR1, USR2, TERM])
def test_a_harvest_writes_the_shard_that_it_has_begun(tmp_path, monkeypatch, signum):
    def harvest(name: str):
        return CacheWriter(data(), str(tmp_path / name), n_tokens=60, shard_tokens=20).build()

    whole = harvest("whole")
    send_at(monkeypatch, LMSource, "_read", 4, signum)
    with pytest.raises(SafeStop, match=f"Stopped by {signum.name}"):
        harvest("stopped")
    monkeypatch.undo()
    assert len(list((tmp_path / "stopped").glob("shard-*"))) == 2 < len(whole.shards)
    assert harvest("stopped") == whole
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / file.name).read_bytes() == file.read_bytes()


def n_descriptors(root: Path, n_members: int, monkeypatch) -> int:
    """How many files are open at most while a group trains, all of whose members have written into their logs."""
    gc.collect()  # maps of an earlier group's rows hold descriptors
    found, read = [], LMSource._read

    def counting(self, n):
        found.append(len(list(Path("/proc/self/fd").iterdir())))
        return read(self, n)

    monkeypatch.setattr(LMSource, "_read", counting)
    logging.getLogger().addHandler(logging.FileHandler(root / "train.log", delay=True))  # Hydra's, which is replaced
    configs = [config(root / str(k), "sae=topk", f"k={k}", "n_tokens=1024") for k in range(1, n_members + 1)]
    train_jobs([read_job(cfg) for cfg in configs])
    monkeypatch.undo()
    assert len(list(root.glob("*/metrics.json"))) == len(list(root.glob("*/train.log"))) == n_members
    return max(found)


def test_the_descriptors_of_a_group_do_not_grow_with_its_members(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        n_open = [n_descriptors(tmp_path / str(n), n, monkeypatch) for n in (2, 6)]
    assert n_open[0] == n_open[1], n_open


def test_commands_of_the_same_second_get_folders_of_their_own(tmp_path):
    folders = [new_folder(str(tmp_path / "a" / "12-00-00")) for _ in range(3)]
    assert [Path(folder).name for folder in folders] == ["12-00-00", "12-00-00-2", "12-00-00-3"]
    assert all(Path(folder).is_dir() for folder in folders)


@pytest.mark.process
def test_a_command_makes_one_folder_and_its_sweep_tells_of_its_own_jobs(tmp_path):
    """Of a grid, and of a search into the same folder."""

    def sweep(*overrides: str):
        done = run("-m", *SMALL, *overrides)
        assert done.returncode == 0, done.stderr
        return done

    (tmp_path / "sweep").mkdir()  # by a command that started in the same second
    grid = ["sae=topk", "k=4,8", "hydra/launcher=shared_stream"]
    done = sweep(*grid, f"hydra.sweep.dir=${{new_folder:{tmp_path / 'sweep'}}}")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["sweep", "sweep-2"]
    assert "2 jobs: 2 complete." in done.stdout
    assert len(planned_jobs(tmp_path / "sweep-2")) == 2
    search = ["hydra/sweeper=reach_l0", "goal_l0=6", "k=interval(5,7)", "hydra.sweeper.n_trials=1"]
    assert "1 job: 1 complete." in sweep(*search, f"hydra.sweep.dir={tmp_path / 'sweep-2'}").stdout
