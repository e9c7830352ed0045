"""What a run folder is taken for."""

import errno
import os
from pathlib import Path

import pytest
from conftest import compose
from omegaconf import OmegaConf

from sae_lab.runs.folder import Run, examine_folder, flatten
from sae_lab.runs.lock import is_running
from sae_lab.runtime.errors import FolderInUse, UserError
from sae_lab.training.checkpoint_io import AtomicCheckpointIO
from sae_lab.training.run import hydra_files
from sae_lab.training.run import open_run as open_of_command


def open_run(folder, *overrides) -> Run:
    """Examine and begin, as `train` does."""
    cfg = compose(f"run_dir={folder}", *overrides)
    run = examine_folder(folder, OmegaConf.to_container(cfg, resolve=True), cfg.resume)
    if not run.complete:
        with run.begin(hydra_files(cfg)):
            pass
    return run


def leave_checkpoint(folder) -> None:
    content = {"global_step": 7, "state_dict": {}, "pytorch-lightning_version": "2.6.6"}
    AtomicCheckpointIO(folder).save_checkpoint(content, folder / "checkpoints" / "last.ckpt")


def test_a_new_folder_starts(tmp_path):
    run = open_run(tmp_path)
    assert (run.checkpoint, run.complete) == (None, False)
    assert (tmp_path / ".hydra" / "config.yaml").is_file()


def test_a_checkpoint_is_continued(tmp_path):
    open_run(tmp_path)
    leave_checkpoint(tmp_path)
    assert open_run(tmp_path).checkpoint == tmp_path / "checkpoints" / "last.ckpt"


def test_what_was_half_written_when_a_run_was_killed_is_removed(tmp_path):
    open_run(tmp_path)
    leave_checkpoint(tmp_path)
    (tmp_path / "sae").mkdir()
    stale = [f"checkpoints/.last.ckpt.{2**22 + 1}", "sae/.sae.safetensors.7", ".hydra/.config.yaml.7"]
    kept = ["checkpoints/.best.ckpt", "checkpoints/last.ckpt", "sae/mine.7", ".mine.7"]
    for name in [*stale, *kept]:
        (tmp_path / name).touch()
    assert open_run(tmp_path).step == 7
    assert not [name for name in stale if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


def test_metrics_mean_complete(tmp_path):
    open_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    assert open_run(tmp_path).complete


def test_where_it_runs_may_change_but_not_what_it_computes(tmp_path):
    open_run(tmp_path)
    leave_checkpoint(tmp_path)
    open_run(tmp_path, "trainer=cpu", "logger=tensorboard", "trainer.checkpoint_every=3", "lm.device=cpu")
    with pytest.raises(UserError, match=r"\(seed is 0 there and 1 here"):
        open_run(tmp_path, "seed=1")


def test_a_value_and_a_list_of_it_are_one_setting(tmp_path):
    open_run(tmp_path, "lm.sites=[transformer.h.2]")
    leave_checkpoint(tmp_path)
    assert open_run(tmp_path, "lm.sites=transformer.h.2").step == 7
    with pytest.raises(UserError, match=r"lm\.sites is transformer\.h\.2 there and transformer\.h\.3 here"):
        open_run(tmp_path, "lm.sites=transformer.h.3")


def test_a_wrong_value_is_told_before_another_config(tmp_path):
    open_run(tmp_path)
    leave_checkpoint(tmp_path)
    for setting, value in {"sae.k_warmup": "foo", "sae.signed": 3, "data.held_out_every": 1, "lm.dtype": None}.items():
        cfg = compose(f"run_dir={tmp_path}", f"{setting}={'null' if value is None else value}")
        with pytest.raises(UserError, match=rf"^{setting}=(foo|3|1|null) must be "):
            open_of_command(cfg)


def test_a_folder_in_which_nothing_was_learnt_takes_another_config(tmp_path):
    open_run(tmp_path, "k=100_000")
    assert open_run(tmp_path, "k=8").checkpoint is None


def test_examining_writes_and_clears_nothing(tmp_path):
    open_run(tmp_path)
    leave_checkpoint(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    examine_folder(tmp_path, {"another": "config"}, "never")
    with pytest.raises(UserError):
        examine_folder(tmp_path, {"another": "config"}, "auto")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_checkpoint_without_its_config_is_refused(tmp_path):
    leave_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"lost its \.hydra/config\.yaml"):
        open_run(tmp_path)


def test_never_clears_what_the_earlier_run_left_and_nothing_else(tmp_path):
    open_run(tmp_path)
    leave_checkpoint(tmp_path)
    for name in ("metrics.json", "metrics.csv", "notes.txt"):
        (tmp_path / name).write_text("{}")
    run = open_run(tmp_path, "k=3", "resume=never")
    assert (run.checkpoint, run.complete) == (None, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hydra", ".lock", "digests.json", "notes.txt"]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    run = Run(tmp_path, 0, False)
    assert not is_running(tmp_path)
    with run.begin({}):
        assert is_running(tmp_path)
        with pytest.raises(FolderInUse, match="another process trains in"), run.begin({}):
            pass
    assert not is_running(tmp_path)
    with run.begin({}):
        pass


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_somebody_elses_folder_is_not_cleared(tmp_path, resume):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "paper.png").write_text("")
    with pytest.raises(UserError, match="is not a run folder, but holds figures: choose another"):
        open_run(tmp_path, f"resume={resume}")
    assert (tmp_path / "figures" / "paper.png").is_file()


def test_a_job_that_failed_before_it_began_may_be_run_by_itself(tmp_path):
    (tmp_path / "failed.txt").write_text("out of memory")
    assert open_run(tmp_path).checkpoint is None
    assert not (tmp_path / "failed.txt").exists()


def test_flat():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": 1, "a.c": {}, "d": [1, 2]}


def test_the_folders_of_a_group_share_one_open_file_and_not_their_next_runs(tmp_path):
    """Locked together, by one descriptor; afterwards two processes may each train in one of them."""
    runs = [Run(tmp_path / name, 0, False) for name in "abc"]

    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(2):  # the second time the folders share the file of the first
        before = n_open()
        with runs[0].begin({}), runs[1].begin({}, runs[0].folder), runs[2].begin({}, runs[0].folder):
            assert n_open() == before + 1
            assert all(is_running(run.folder) for run in runs)
            with pytest.raises(FolderInUse), runs[2].begin({}):
                pass
        assert not any(is_running(run.folder) for run in runs)
    with runs[1].begin({}):
        assert [is_running(run.folder) for run in runs] == [False, True, False]
        with runs[2].begin({}):
            assert is_running(runs[2].folder)
    assert sorted(path.name for path in runs[0].folder.iterdir()) == [".lock", "digests.json"]


def test_a_file_system_without_hard_links_locks_each_folder_by_itself(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    runs = [Run(tmp_path / name, 0, False) for name in "ab"]
    with runs[0].begin({}), runs[1].begin({}, runs[0].folder):
        assert all(is_running(run.folder) for run in runs)
    assert not any(is_running(run.folder) for run in runs)
