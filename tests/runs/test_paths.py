"""Paths of a run: absolute in its folder, so that it opens from anywhere; what moved is known by its digests."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_older_runs import FIXTURES, OVERRIDES

from sae_lab.lm.finding import TINY, find_folder
from sae_lab.runs.folder import examine_folder, raise_if_config_differs
from sae_lab.runs.loading import load_run
from sae_lab.runs.paths import MAY_MOVE, may_move, with_absolute_paths
from sae_lab.runtime.errors import UserError
from sae_lab.training.run import train_run

QUICK = ["n_tokens=512", "data.n_eval_tokens=64", "data.n_val_tokens=64", "calibration_batches=1"]
MOVED_PATHS = ["data.paths=[moved/text.md]", "lm.name=moved/lm"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A finished and a stopped run of before, their text, and another place with the same text and model."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    shutil.copytree(find_folder(TINY), tmp_path / "moved" / "lm", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(tmp_path / "text.md", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_of_relative_paths_opens_from_elsewhere(folder, monkeypatch):
    init_from = ["init_from=finished", "n_latents=32", "sae.normalize=mean_norm"]
    train_run(compose(*OVERRIDES, *QUICK, *MOVED_PATHS, *init_from, "run_dir=run"))
    written = yaml.safe_load((folder / "run" / ".hydra" / "config.yaml").read_text())
    assert (written["lm"]["name"], written["data"]["paths"]) == (
        str(folder / "moved" / "lm"),
        [str(folder / "moved" / "text.md")],
    )
    assert written["init_from"] == str(folder / "finished")
    assert str(folder) not in (folder / "run" / "sae" / "config.json").read_text()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    _, data, _ = load_run(folder / "run", device="cpu")
    assert data.probe_rows().shape[1:] == (1, 128)


def test_a_stopped_run_continues_with_what_moved(folder):
    (folder / "text.md").unlink()
    train_run(compose(*OVERRIDES, *MOVED_PATHS, f"run_dir={folder / 'stopped'}"))
    there, here = (load_file(folder / run / "sae" / "sae.safetensors") for run in ("finished", "stopped"))
    for name, tensor in here.items():
        assert (tensor - there[name.replace("sources.", "")]).abs().max() < 1e-3, name


@pytest.mark.parametrize(("what", "file"), [("the text", "text.md"), ("the tokenizer", "lm/tokenizer.json")])
def test_something_else_in_the_new_place_is_refused(folder, what, file):
    changed = folder / "moved" / file
    text = changed.read_text()
    changed.write_text(text.replace("the", "thee") if file == "text.md" else json.dumps(json.loads(text) | SHORT))
    with pytest.raises(UserError, match=f"{what} changed since this run began"):
        train_run(compose(*OVERRIDES, *MOVED_PATHS, f"run_dir={folder / 'stopped'}"))


SHORT = {"truncation": {"direction": "Right", "max_length": 4096, "strategy": "LongestFirst", "stride": 0}}


def test_a_complete_run_is_not_shown_for_another_model(folder):
    """It loads nothing, so nothing would tell."""
    cfg = compose(*OVERRIDES, *MOVED_PATHS, "run_dir=finished")
    with pytest.raises(UserError, match=r"another config \(.*lm\.name is tiny there and .*moved/lm here"):
        examine_folder(folder / "finished", OmegaConf.to_container(cfg, resolve=True), "auto")


def test_what_is_no_path_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "lm": {"name": "gpt2", "base": {"name": "./a"}, "tokenizer": None},
        "data": {"paths": ["~/x/*.txt", "/x", "s3://b/x", "x/**/*.md"], "path": "gs://cache"},
    }
    assert with_absolute_paths(config) == config | {
        "data": {"paths": ["~/x/*.txt", "/x", "s3://b/x", f"{tmp_path}/x/**/*.md"], "path": "gs://cache"}
    }
    (tmp_path / "gpt2").mkdir()
    assert with_absolute_paths(config)["lm"]["name"] == f"{tmp_path}/gpt2"
    assert with_absolute_paths({"lm": 3, "data": {"paths": None}}) == {"lm": 3, "data": {"paths": None}}


def test_a_data_set_of_the_hub_may_not_become_another():
    hub = {"data": {"_target_": "sae_lab.activations.from_text.hub", "path": "a"}}
    cached = {"data": {"_target_": "sae_lab.cache.data.CachedData", "path": "a"}}
    assert may_move(hub) == MAY_MOVE
    assert may_move(cached) == (*MAY_MOVE, "data.path")
    with pytest.raises(UserError, match=r"data\.path is a there and b here"):
        raise_if_config_differs(Path("run"), hub, {"data": hub["data"] | {"path": "b"}}, may_move(hub))


@pytest.mark.parametrize("named", [False, True])
def test_the_files_of_a_mixture_may_move_too(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web").mkdir()

    def mixture(files: str, web: str):
        parts = {"code": {"paths": [files]}, "web": {"path": web, "held_out_every": 10}}
        parts = parts if named else [*parts.values()]
        return {"data": {"_target_": "sae_lab.activations.mixture.mixture", "parts": parts, "sources": parts}}

    here = mixture("x/*.md", "web")
    assert with_absolute_paths(here) == mixture(f"{tmp_path}/x/*.md", f"{tmp_path}/web")
    raise_if_config_differs(Path("run"), mixture("y/*.md", "web"), here, may_move(here))
    key = r"data\.parts\.web\.path" if named else r"data\.parts\[1\]\.path"
    with pytest.raises(UserError, match=rf"{key} is other there and /\S+/web here"):
        raise_if_config_differs(Path("run"), mixture("x/*.md", "other"), here, may_move(here))
