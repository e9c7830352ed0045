"""Damaged files of a run folder are told in one sentence: nothing of them is used, and nothing is overwritten."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import build as build_sae
from conftest import compose, planted
from damage import KINDS, damage, flipped
from omegaconf import OmegaConf

from sae_lab.runs.digests import CHECKPOINT, DIGESTS, METRICS, SAE, check_unaltered, recorded_when_written
from sae_lab.runs.folder import Run, examine_folder
from sae_lab.runs.loading import load_run
from sae_lab.runs.results import read_metrics, write_metrics
from sae_lab.runtime.errors import UserError
from sae_lab.saes.files import save_sae
from sae_lab.training.checkpoint_io import AtomicCheckpointIO
from sae_lab.training.run import hydra_files, show_complete

CONFIG, OVERRIDES, SECRETS = ".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/from_environment.txt"


def write_run(folder: Path, seed: int, step: int = 7) -> Path:
    """A run as `train` leaves it, but for the training."""
    cfg = compose(f"seed={seed}", f"run_dir={folder}")
    run = Run(folder, 0, False)
    sae = build_sae("batch_topk", f"seed={seed}")
    more = {"overrides.yaml": f"- seed={seed}\n- k=16\n", "from_environment.txt": f"data.{seed}\n"}
    with run.begin(hydra_files(cfg) | more):
        save_checkpoint(run, sae.state_dict(), step)
        save_sae(sae, folder / "sae", {}, planted(8)[0])
        write_metrics({"fvu": 0.25 + seed, "l0": 16.0}, sae, folder / METRICS)
    return folder


def save_checkpoint(run: Run, state: dict, step: int) -> None:
    content = {"global_step": step, "state_dict": state, "pytorch-lightning_version": "2.6.6"}
    AtomicCheckpointIO(run.folder).save_checkpoint(content, run.last_checkpoint)


@cache
def config_of(run: Path):
    return OmegaConf.to_container(compose("seed=0", f"run_dir={run}"), resolve=True)


def resume(folder: Path, written: Path) -> Run:
    """Open the folder as the command does that wrote `written`."""
    return examine_folder(folder, config_of(written), "auto")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run, and one of another seed."""
    parent = tmp_path_factory.mktemp("runs")
    return write_run(parent / "run", 0), write_run(parent / "other", 1)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_told(folder: Path, *ways) -> None:
    """Each way to use the folder ends in a UserError of one line, and writes nothing."""
    before = contents(folder)
    for use in ways:
        with pytest.raises(UserError) as told:
            use(folder)
        assert "\n" not in str(told.value)
    assert contents(folder) == before


def test_an_undamaged_run_is_used(runs):
    run, _ = runs
    assert resume(run, run).complete
    assert read_metrics(run)["fvu"] == 0.25


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in (CONFIG, OVERRIDES, SECRETS, METRICS, DIGESTS)
        for kind in KINDS
        # Without metrics.json the run is not complete, without digests.json it is as one of earlier versions.
        if not (kind == "missing" and name in (METRICS, DIGESTS))
    ],
)
def test_a_damaged_setting_is_told(runs, tmp_path, name, kind):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    damage(folder / name, kind, (runs[1] / name).read_bytes())
    assert_told(folder, lambda f: resume(f, runs[0]), lambda f: load_run(f, device="cpu"))
    if name == METRICS:
        assert_told(folder, read_metrics, lambda f: show_complete(Run(f, 7, True)))


@pytest.mark.parametrize("kind", [*KINDS, *(f"flip {seed}" for seed in range(10, 40)), "another step's"])
def test_a_damaged_checkpoint_is_told(runs, tmp_path, kind):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    (folder / METRICS).unlink()
    assert resume(folder, runs[0]).step == 7
    if kind == "another step's":
        old = (folder / CHECKPOINT).read_bytes()
        save_checkpoint(Run(folder, 7, False), {"w": torch.ones(3)}, 8)
        assert resume(folder, runs[0]).step == 8
        (folder / CHECKPOINT).write_bytes(old)
    else:
        damage(folder / CHECKPOINT, kind, (runs[1] / CHECKPOINT).read_bytes())
    assert_told(folder, lambda f: resume(f, runs[0]))


@pytest.mark.parametrize("part", range(0, 100, 4))
def test_a_flip_anywhere_in_the_zip_is_told(runs, tmp_path, part):
    """Headers, padding and directory of the archive too, which its own checksums leave out."""
    folder = shutil.copytree(runs[0], tmp_path / "run")
    (folder / METRICS).unlink()
    content = (folder / CHECKPOINT).read_bytes()
    (folder / CHECKPOINT).write_bytes(flipped(content, 8 * len(content) * part // 100))
    assert_told(folder, lambda f: resume(f, runs[0]))


def test_a_run_without_digests_says_so_once_and_is_used(runs, tmp_path, caplog):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    (folder / DIGESTS).unlink()
    assert resume(folder, runs[0]).complete
    assert caplog.text.count("was written without digests") == 1


@pytest.mark.parametrize("write", ["settings", "checkpoint", "metrics"])
@pytest.mark.parametrize("killed_at", range(4))
def test_a_run_that_is_killed_while_it_writes_fits_its_record(runs, tmp_path, monkeypatch, write, killed_at):
    """Killed before the n-th file is put in its place, it can be opened and goes on."""
    folder = shutil.copytree(runs[0], tmp_path / "run")
    if write != "metrics":
        (folder / METRICS).unlink()
    run, real, calls = resume(folder, runs[0]), Path.replace, []

    def replace(self, target):
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        calls.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    try:
        if write == "metrics":
            write_metrics({"fvu": 0.5}, build_sae("batch_topk"), folder / METRICS)
        elif write == "checkpoint":
            save_checkpoint(run, {"w": torch.ones(5)}, 9)
        else:
            with run.begin({"config.yaml": (runs[0] / CONFIG).read_text() + "# again\n", "overrides.yaml": "- k=16\n"}):
                pass
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert resume(folder, runs[0]).step in ((0,) if write == "metrics" else (7, 9))


@pytest.mark.parametrize(
    "name", ["figures", "metrics.csv", ".lock", "train.log", "checkpoints/last.ckpt", "sae/config.json"]
)
def test_a_link_out_of_a_run_folder_is_told(runs, tmp_path, name):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    assert_told(folder, lambda f: resume(f, runs[0]), lambda f: load_run(f, device="cpu"))
    assert victim.read_text() == "mine"


def test_the_sae_of_another_run_is_told(tmp_path):
    folder = write_run(tmp_path / "run", seed=0)
    for seed in (1, 2):  # trained again: the record follows
        with recorded_when_written(folder, SAE):
            save_sae(build_sae("topk", f"seed={seed}"), folder / "sae")
        check_unaltered(folder, SAE)
    shutil.rmtree(folder / "sae")
    save_sae(build_sae("topk", "seed=3"), folder / "sae")
    with pytest.raises(UserError, match=r"sae/config\.json changed since the run wrote it"):
        check_unaltered(folder, SAE)
