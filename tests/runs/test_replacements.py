"""An evaluation with other settings of a run's model and data, and where it is written."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import compose
from omegaconf import OmegaConf
from shell import run
from small_runs import assert_one_sentence

from sae_lab.lm.finding import TINY, find_folder
from sae_lab.runs.config import read_config
from sae_lab.runs.folder import Run, raise_if_config_differs
from sae_lab.runs.loading import load_run
from sae_lab.runs.paths import CACHED
from sae_lab.runs.replacements import Default, replace_settings, replaced_settings, suffix_of
from sae_lab.runtime.errors import UserError
from sae_lab.training.run import train_run

TEXT = 40 * "A document about nothing in particular. "
RUN = [
    *("n_tokens=2048", "seq_len=32", "batch_size=64", "expansion=2", "k=4", "data=text_files", "lm.device=cpu"),
    *("data.n_eval_tokens=512", "data.n_val_tokens=128", "calibration_batches=2", "data.held_out_every=2"),
    *("data.block_tokens=1024", "trainer=cpu"),
]


def write_text(folder: Path, words: str) -> Path:
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"{i} {TEXT}{words * 40}")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replacements")
    text = write_text(folder / "text", "one two three ")
    train_run(compose(*RUN, f"data.paths=['{text}/*.txt']", f"run_dir={folder / 'run'}"))
    return folder / "run"


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of the run, beside other text."""
    write_text(tmp_path / "other", "four five six ")
    return Path(shutil.copytree(trained, tmp_path / "run"))


def ce_clean(run_dir: Path, **replace) -> float:
    _, data, _ = load_run(run_dir, "cpu", replace=replace)
    tokens = data.held_out_rows(512)
    log_p = data.lm.logits(tokens)[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, tokens[:, 1:, None]).mean().item()


def test_a_setting_is_replaced_or_named():
    config = OmegaConf.create({"lm": {"base": {"name": "a"}, "device": "cpu"}, "data": {"seed": 0}, "k": 1})
    other = replace_settings(config, {"lm.base.name": "b", "data.seed": 3})
    assert (other.lm.base.name, other.data.seed, config.data.seed) == ("b", 3, 0)
    assert replaced_settings(config, other) == {"data.seed": 3, "lm.base.name": "b"}
    for key, place in (
        ("data.sede", r"did you mean data\.seed\? data has seed"),
        ("lm.base.x", "lm.base has name"),
        ("lm.x.y", "lm.x has no"),
    ):
        with pytest.raises(UserError, match=f"^{key} is not a setting of this run: {place}"):
            replace_settings(config, {key: 1})


def test_a_setting_of_other_data_is_no_misspelling():
    config = OmegaConf.create({"lm": {}, "data": {"_target_": "a.tensor", "path": "x.pt", "batch_size": 8}})
    sentence = "run: the run's data has no such setting, only other data do: leave it out; data has path, batch_size"
    with pytest.raises(UserError, match=f"^data.lm_batch_rows is not a setting of this {sentence}"):
        replace_settings(config, {"data.lm_batch_rows": 4})


def test_other_data_keep_the_settings_of_the_stream():
    config = OmegaConf.create({"lm": {}, "data": {"_target_": "a.stdlib", "held_out_every": 10, "seq_len": 7}})
    chosen = {"_target_": "a.text_files", "paths": ["x"], "seq_len": Default(), "order": Default("as_read")}
    other = replace_settings(config, {f"data.{name}": value for name, value in chosen.items()})
    assert other.data == {"_target_": "a.text_files", "paths": ["x"], "seq_len": 7, "order": "as_read"}


def test_file_names_say_what_differs():
    assert suffix_of({}) == ""
    assert suffix_of({"data.n_eval_tokens": 1000}) == "_n_eval_tokens=1000"
    assert suffix_of({"data._target_": "a.text_files", "lm.dtype": "bfloat16"}) == "_data=text_files,lm.dtype=bfloat16"
    names = [suffix_of({"data.paths": [path]}) for path in ("../a b", "../a*b", "..\\a\nb", "x" * 300, "x" * 301)]
    assert len(set(names)) == 5
    assert all(len(name) <= 100 and not set(name) & set("/\\ *\n[]'") for name in names)


def test_what_changes_no_number_has_no_name(run_dir):
    _, data, config = load_run(run_dir, "cpu", replace={"data.lm_batch_rows": 3, "data.prefetch": True})
    assert data.lm_batch_rows == 3
    assert replaced_settings(read_config(run_dir), config) == {}


def test_other_text_is_refused_unless_it_is_asked_for(run_dir, tmp_path):
    before = ce_clean(run_dir)
    assert ce_clean(run_dir, **{"data.lm_batch_rows": 2}) == before
    other = {"data.paths": [f"{tmp_path}/other/*.txt"]}
    assert abs(ce_clean(run_dir, **other) - before) > 0.01
    text = Path(read_config(run_dir).data.paths[0]).parent
    for file in text.glob("*.txt"):
        shutil.copy(file, tmp_path)
        file.write_text(file.read_text() + "more")
    try:
        with pytest.raises(UserError, match="the text changed since this run began"):
            load_run(run_dir, "cpu", replace={"data.lm_batch_rows": 2})
        load_run(run_dir, "cpu", replace=other)
    finally:
        for file in text.glob("*.txt"):
            shutil.copy(tmp_path / file.name, file)


def test_a_model_of_another_width_or_number_of_sites_is_named(run_dir):
    with pytest.raises(UserError, match=r"width 128 at 1 site, and tiny has width 128 at the 2 of lm\.sites"):
        load_run(run_dir, "cpu", replace={"lm.sites": ["transformer.h.1", "transformer.h.2"]})
    with pytest.raises(UserError, match=r"device=cpu and lm\.device=cuda place the same model"):
        load_run(run_dir, "cpu", replace={"lm.device": "cuda"})


@pytest.mark.process
def test_evaluate_keeps_the_runs_own_files(run_dir, tmp_path):
    """The model from another folder, other text, fewer tokens; then the run's own again, in other passes."""
    own = {file: file.read_bytes() for file in (run_dir / "metrics.json", *(run_dir / "figures").iterdir())}
    paths = f"data.paths=['{tmp_path}/other/*.txt']"
    for over in (["n_eval_tokens=128"], [paths], [f"lm.name={find_folder(TINY)}"]):
        done = run(f"run_dir={run_dir}", *over, module="evaluate")
        assert done.returncode == 0, done.stderr
    assert {file: file.read_bytes() for file in own} == own
    fewer = json.loads((run_dir / "metrics_n_eval_tokens=128.json").read_text())
    assert (fewer["n_eval_tokens"], fewer["settings"]) == (128, {"data.n_eval_tokens": 128})
    assert (run_dir / "figures_n_eval_tokens=128" / "l0_per_token.png").is_file()
    [other], [moved] = (list(run_dir.glob(f"metrics_{key}=*.json")) for key in ("paths", "lm.name"))
    before = json.loads((run_dir / "metrics.json").read_text())
    assert json.loads(other.read_text())["ce_clean"] == pytest.approx(
        ce_clean(run_dir, **{"data.paths": [f"{tmp_path}/other/*.txt"]}), abs=1e-5
    )
    assert before | {"settings": {"lm.name": str(find_folder(TINY))}} == json.loads(moved.read_text())

    done = run(f"run_dir={run_dir}", "lm.device=cpu", "data.lm_batch_rows=5", "n_eval_tokens=512", module="evaluate")
    assert done.returncode == 0, done.stderr
    again = json.loads((run_dir / "metrics.json").read_text())
    assert again["ce_spliced"] == pytest.approx(before["ce_spliced"], abs=1e-5)
    done = run(f"run_dir={run_dir}", "n_eval_tokens=128", "overwrite=true", module="evaluate")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "metrics.json").read_text())["n_eval_tokens"] == 128
    done = run(f"run_dir={run_dir}", "data.lm_batch_rwos=8", module="evaluate")
    assert_one_sentence(
        done, "data.lm_batch_rwos is not a setting of this run: did you mean data.lm_batch_rows? data has"
    )


@pytest.mark.process
def test_features_of_other_text_have_a_folder_of_their_own(run_dir):
    sizes = ["n_latents=64", "n_tokens=256", "lm.device=cpu", "data.lm_batch_rows=2"]
    for over in ([], ["data=stdlib"]):
        done = run(f"run_dir={run_dir}", *sizes, *over, module="features")
        assert done.returncode == 0, done.stderr
    folders = [
        run_dir / "features_n_latents=64,n_tokens=256",
        *run_dir.glob("features_n_latents=64,n_tokens=256,data=*"),
    ]
    pages = [json.loads((folder / "features.json").read_text()) for folder in folders]
    assert not (run_dir / "features").exists()
    assert pages[0]["latents"] != pages[1]["latents"]


def test_a_fresh_start_removes_all_evaluations_and_nothing_else(run_dir):
    for name in ("figures_n_eval_tokens=128", "features_paths=x-1", "features", "figures_of_mine"):
        (run_dir / name).mkdir()
    (run_dir / "metrics_n_eval_tokens=128.json").touch()
    with Run(run_dir, 0, False).begin({}):
        assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "digests.json", "figures_of_mine"]


def test_rows_of_a_pass_may_differ_on_text_but_decide_the_order_of_a_cache(tmp_path):
    text, cache = ({"data": {"_target_": name}} for name in ("sae_lab.activations.from_text.stdlib", CACHED))
    for config, key, allowed in (
        (text, "lm_batch_rows", True),
        (text, "lm_batch_tokens", True),
        (cache, "lm_batch_tokens", True),
        (cache, "lm_batch_rows", False),
        (text, "block_tokens", False),
    ):
        there, here = ({"data": config["data"] | {key: n}} for n in (8, 32))
        if allowed:
            raise_if_config_differs(tmp_path, there, here)
        else:
            with pytest.raises(UserError, match=f"data.{key} is 8 there and 32 here"):
                raise_if_config_differs(tmp_path, there, here)
