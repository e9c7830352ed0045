"""A refused command leaves what it found: no folder, no file, and the plan of an earlier sweep."""

import logging
from pathlib import Path

import fuzz
import pytest

from sae_lab.cli.refused import OF_A_RUN, leave_as_found, remember_as_found

REFUSED = [
    ("train", ["k=abc", "hydra.run.dir=new/mine"]),
    ("train", ["k=abc", "hydra.run.dir='new/${hydra:job.name}/${k}'"]),
    ("train", ["data=text_files", "data.paths=none.txt", "hydra.run.dir=new"]),
    ("train", ["k=abc", "hydra.run.dir=there"]),
    ("train", ["-m", "sae=nosuch,topk", "hydra.sweep.dir=new/mine"]),
    ("train", ["-m", "sae=nosuch,topk"]),
    ("train", ["-m", "sae=nosuch,topk", "hydra.sweep.dir=there"]),
    ("train", ["-m", "sae.bogus=1,2", "hydra/launcher=shared_stream", "hydra.sweep.dir=new"]),
    ("benchmark", ["d_in=abc", "hydra.run.dir=new"]),
    ("evaluate", ["run_dir=none", "hydra.run.dir=new"]),
]


def everything() -> dict[Path, str]:
    return {path: path.read_text() if path.is_file() else "" for path in Path().rglob("*")}


@pytest.mark.parametrize(("command", "overrides"), REFUSED)
def test_a_refused_command_leaves_what_it_found(command, overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there", "k=8").mkdir(parents=True)
    Path("there", "jobs.txt").write_text("k=8\n")
    before = everything()
    assert fuzz.outcome(fuzz.Draw(command, overrides)) != "success"
    assert everything() == before


@pytest.mark.parametrize("theirs", ["metrics.csv", "other.log", None])
def test_only_a_folder_that_holds_the_commands_log_alone_is_removed(theirs, tmp_path, monkeypatch):
    """Other files are its work, or of other commands."""
    folder = tmp_path / "new" / "run"
    remember_as_found(folder)
    folder.mkdir(parents=True)
    log = logging.FileHandler(folder / "train.log")
    monkeypatch.setattr(logging.getLogger(), "handlers", [log])
    if theirs:
        (folder / theirs).write_text("")
    leave_as_found()
    log.close()
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == ({"new", "run", "train.log", theirs} if theirs else set())


def test_a_run_changes_no_file_of_a_sweep_that_another_command_has_begun(tmp_path):
    (tmp_path / "jobs.txt").write_text("k=4\n")
    remember_as_found(tmp_path, OF_A_RUN)
    (tmp_path / "jobs.txt").write_text("k=8\n")
    (tmp_path / "multirun.yaml").write_text("")
    leave_as_found()
    assert (tmp_path / "jobs.txt").read_text() == "k=8\n"
    assert (tmp_path / "multirun.yaml").exists()
