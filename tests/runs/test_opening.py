"""Commands on any SAE: a run, an SAE folder of ours, and folders of other libraries."""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import build, compose
from omegaconf import OmegaConf
from safetensors.torch import save_file
from shell import run
from small_runs import assert_one_sentence

from sae_lab.cli.replaced import allow_new_keys
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.evaluation.latents import choose_latents, describe_latents
from sae_lab.evaluation.matching import compare_all, compare_dictionaries
from sae_lab.evaluation.steering import Sampling, steer
from sae_lab.interop.load import load_sae
from sae_lab.interop.trained_on import trained_on
from sae_lab.runs.export import export_sae
from sae_lab.runs.folder import flatten
from sae_lab.runs.opening import open_sae
from sae_lab.runs.pages import check_comparison, write_comparison_page
from sae_lab.runs.result_folders import distinct_names
from sae_lab.runtime.errors import UserError
from sae_lab.saes.files import save_sae
from sae_lab.training.run import train_run

TEXT = 60 * "import os; a document about nothing in particular, with one two three. "
RUN = [
    *("n_tokens=2048", "seq_len=32", "batch_size=64", "expansion=2", "k=4", "data=text_files", "lm.device=cpu"),
    *("data.n_eval_tokens=256", "data.n_val_tokens=128", "calibration_batches=2", "data.held_out_every=2"),
    *("data.block_tokens=1024", "trainer=cpu", "sae.normalize=none"),
]
SIZES = {"n_tokens": 256, "n_top": 2, "n_random": 1, "context": 3, "n_logits": 3, "n_neighbours": 2}
KINDS = ("run", "folder", "sae_lens", "dictionary_learning", "gemma_scope_2")


def write_gemma_scope_2(folder: Path) -> None:
    """A JumpReLU SAE in the files of Gemma Scope 2."""
    sae = build("jumprelu", "sae.normalize=none", d_in=128, n_latents=64)
    weights = {"w_enc": sae.W_enc[:, 0].T, "w_dec": sae.W_dec[:, 0], "b_enc": sae.b_enc, "b_dec": sae.b_dec[0]}
    tensors = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    folder.mkdir()
    save_file(tensors | {"threshold": torch.full((64,), 0.1)}, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "type": "sae", "hf_hook_point_in": "model.layers.2.output"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One SAE, as a run and as folders of several kinds, beside the text that it was trained on."""
    root = tmp_path_factory.mktemp("opening")
    (root / "text").mkdir()
    for i in range(6):
        (root / "text" / f"{i}.txt").write_text(f"{i} {TEXT}")
    train_run(compose(*RUN, f"data.paths=['{root}/text/*.txt']", f"run_dir={root / 'run'}"))
    shutil.copytree(root / "run" / "sae", root / "folder")
    for format in ("sae_lens", "dictionary_learning"):
        export_sae(root / "run", format, root / format)
    write_gemma_scope_2(root / "gemma_scope_2")
    return root


def typed(root: Path) -> dict[str, object]:
    """What `lm=tiny data=text_files ...` says of language model and data."""
    cfg = OmegaConf.to_container(compose(*RUN, f"data.paths=['{root}/text/*.txt']", "run_dir=x"), resolve=True)
    return flatten({"lm": cfg["lm"], "data": cfg["data"]})


def open_kind(root: Path, kind: str):
    """Open one of KINDS; a run needs nothing, and our folder only where the text is, which it does not tell."""
    if kind == "gemma_scope_2" and importlib.util.find_spec("sae_lab.interop.gemma_scope_2") is None:
        pytest.skip("Gemma Scope 2 cannot be read")
    paths = {"data.paths": [f"{root}/text/*.txt"]}
    replace = {} if kind == "run" else paths if kind == "folder" else typed(root)
    return open_sae(root / kind, "cpu", replace=replace, typed={"lm": "tiny"}, options={"calibration_batches": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_of_any_kind_is_evaluated_described_steered_and_compared(root, kind):
    opened = open_kind(root, kind)
    assert (opened.folder == root / "run") == (kind == "run")
    assert opened.folder.is_dir()
    sae, data = opened.sae, opened.data
    metrics = evaluate(sae, data).metrics
    assert metrics["fvu"] > 0
    assert metrics["ce_clean"] > 0
    assert metrics["l0"] > 0
    if kind in ("run", "folder", "sae_lens", "dictionary_learning"):
        there = json.loads((root / "run" / "metrics.json").read_text())
        assert metrics["ce_clean"] == there["ce_clean"]
        assert metrics["fvu"] == pytest.approx(there["fvu"], rel=1e-4)
    described = describe_latents(sae, data, torch.tensor([0, 5]), **SIZES)
    assert [one["latent"] for one in described["latents"]] == [0, 5]
    table = steer(sae, data, 5, "import", [3.0], unit="norm", n_tokens=64, sampling=Sampling(n_new=3))["table"]
    assert [row["strength"] for row in table] == [None, 3.0]
    assert table[0]["kl"] == 0
    assert table[1]["kl"] > 0
    same = compare_dictionaries(sae, load_sae(root / kind)).numbers
    assert same["n_shared"] == sae.n_latents
    assert same["mean_matched_cosine"] == pytest.approx(1)


def test_what_is_missing_or_does_not_fit_is_said(root):
    with pytest.raises(UserError, match="does not say its language model and its data: give lm="):
        open_sae(root / "sae_lens", "cpu")
    with pytest.raises(UserError, match="does not say its data: give data="):
        open_sae(root / "sae_lens", "cpu", replace={k: v for k, v in typed(root).items() if k.startswith("lm.")})
    sites = {"lm.sites": ["transformer.h.2", "transformer.h.3"]}
    with pytest.raises(UserError, match=r"width 128 at 1 site, and tiny has width 128 at the 2 of lm.sites: correct"):
        open_sae(root / "sae_lens", "cpu", replace=typed(root) | sites, typed=sites)


def test_an_sae_is_read_where_its_files_say(root, tmp_path):
    def sites_of(name: str, **typed_too: object) -> tuple[str, ...]:
        given = typed(root) | typed_too
        return open_sae(root / name, "cpu", replace=given, typed=typed_too).data.lm.sites

    assert sites_of("sae_lens") == sites_of("gemma_scope_2") == ("blocks.2.hook_resid_post",)
    assert sites_of("sae_lens", **{"lm.sites": ["blocks.3.hook_resid_pre"]}) == ("blocks.3.hook_resid_pre",)
    copy = Path(shutil.copytree(root / "sae_lens", tmp_path / "copy"))
    config = json.loads((copy / "cfg.json").read_text())
    config["metadata"] |= {"hook_name": "blocks.9.hook_resid_post", "hf_hook_name": None, "model_name": "gpt2"}
    (copy / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"on blocks.9.hook_resid_post of gpt2, which tiny does not have: type lm.si"):
        open_sae(copy, "cpu", replace=typed(root))
    save_sae(load_sae(root / "run"), tmp_path / "bare")
    with pytest.raises(UserError, match=r"does not say on which sites it was trained: type lm.sites=\["):
        open_sae(tmp_path / "bare", "cpu", replace=typed(root))


def test_where_published_saes_were_trained():
    def sites(config: dict, n_inputs: int = 0, n_sources: int = 1) -> list[list[str]]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            return trained_on(folder, None, n_inputs, n_sources).sites

    assert sites({"hook_point": "blocks.{layer}.hook_mlp_out", "hook_point_layer": 3}) == [["blocks.3.hook_mlp_out"]]
    named = sites({"trainer": {"submodule_name": "resid_post_layer_4", "lm_name": "pythia"}})
    assert named == [["blocks.4.hook_resid_post"]]
    both = {"hook_point_in": "blocks.1.mlp.hook_in", "hook_point_out": "blocks.1.hook_mlp_out"}
    assert sites(both, 1, 2) == [[*both.values()]]
    assert sites({"dtype": "float32"}) == []
    scope = ("gemma-scope-2b-pt-res", "layer_15/width_16k/average_l0_78")
    assert trained_on(*scope, 0, 1).sites == [["blocks.15.hook_resid_post"]]
    assert trained_on("google/gemma-scope-2b-pt-res", scope[1], 0, 1).model == "gemma-2-2b"


def test_an_sae_folder_runs_no_code_that_it_names(root, tmp_path):
    folder = Path(shutil.copytree(root / "folder", tmp_path / "folder"))
    description = json.loads((folder / "config.json").read_text())
    description["provenance"]["data"]["_target_"] = "os.system"
    (folder / "config.json").write_text(json.dumps({k: v for k, v in description.items() if k != "digests"}))
    with pytest.raises(UserError, match=r"asks to run os.system \(data._target_\)"):
        open_sae(folder, "cpu")


def test_results_of_other_settings_have_a_name_of_their_own(root):
    replace = {"data.paths": [f"{root}/text/*.txt"]}
    assert open_sae(root / "run", "cpu", n_eval_tokens=64).settings == {"data.n_eval_tokens": 64}
    assert open_sae(root / "folder", "cpu", n_eval_tokens=64, replace=replace).settings["data.n_eval_tokens"] == 64
    own = open_sae(root / "sae_lens", "cpu", replace=typed(root), typed={"lm": "tiny", "lm.device": "cpu"})
    assert own.settings == {"lm": "tiny"}
    assert own.folder == root / "sae_lens" / "results"


def test_names_tell_saes_apart():
    assert distinct_names([("a/x/sae", None), ("b/x/sae", None)]) == ["a/x/sae", "b/x/sae"]
    assert distinct_names([("hub/repo", "layer_0"), ("hub/repo", "layer_1")]) == ["layer_0", "layer_1"]
    assert distinct_names([("a", None), ("a", None)]) == ["a (0)", "a (1)"]


def test_latents_are_numbers_and_ranges(root):
    sae = load_sae(root / "run")
    for given in ("17, 20-22", [22, 17, 20, 21]):
        assert choose_latents(sae, given, 3).tolist() == [17, 20, 21, 22]
    assert choose_latents(sae, 17, 3).tolist() == [17]
    for wrong in ("17,", "22-20", "0-999999999", [], [True], [-1], 1.0):
        with pytest.raises(UserError, match=r"must be numbers between 0 and 255, such as latents=\[0,255\]"):
            choose_latents(sae, wrong, 3)


def test_arguments_are_quoted_for_hydra():
    typed = ["sae=moved/mat é", "latents=17, 20-25", "latents=17", "latents=[1,2]"]
    assert allow_new_keys(typed) == ["run_dir='moved/mat é'", 'latents="17, 20-25"', *typed[2:]]
    assert allow_new_keys(["sae=[a,b]"]) == ["run_dir=[a,b]"]
    jobs = "sae=[first/k=8,sae=topk, first/k=8,b=[1,2],outputs/demo]"
    assert allow_new_keys([jobs]) == ["run_dir=['first/k=8,sae=topk','first/k=8,b=[1,2]',outputs/demo]"]


def test_a_comparison_of_other_saes_is_not_written_over(tmp_path, caplog):
    saes = {name: build("topk", d_in=16, n_latents=32) for name in "abc"}
    sources = {name: (f"{name}_folder", None) for name in saes}
    write_comparison_page(compare_all(saes), tmp_path, sources, "facts")
    assert len([*tmp_path.glob("latents_*.csv")]) == 3
    check_comparison(tmp_path, sources)
    pair = {name: sources[name] for name in "ab"}
    with pytest.raises(UserError, match="holds a comparison of other SAEs"):
        check_comparison(tmp_path, pair)
    write_comparison_page(compare_all({name: saes[name] for name in pair}), tmp_path, pair)
    assert [file.name for file in tmp_path.glob("latents_*.csv")] == ["latents_0.csv"]
    transcoder = build("topk", "sae.n_inputs=1", "sae.normalize=none", d_in=16, n_latents=32, n_sources=2)
    compare_all({"sae": saes["a"], "transcoder": transcoder})
    assert "transcoder is a transcoder and sae is not" in caplog.text


@pytest.mark.process
def test_the_commands_take_sae(root):
    text = ["data=text_files", f"data.paths=['{root}/text/*.txt']", "data.seq_len=32", "data.held_out_every=2"]
    foreign = ["sae=sae_lens", "lm=tiny", *text, "device=cpu"]
    done = run(*foreign, "n_eval_tokens=128", "out=results", module="evaluate", cwd=root)
    assert done.returncode == 0, done.stderr
    (written,) = (root / "results").glob("metrics_*.json")
    assert json.loads(written.read_text())["settings"]["lm"] == "tiny"
    done = run("run_dir=run", "latent=3", "strength=2", "prompt=import", "n_new=3", "n_tokens=64", "unit=code",
               module="steer", cwd=root)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(next((root / "run").glob("steer_latent=3,strength=2*.json")).read_text())
    assert [(row["strength"], row["value"]) for row in found["table"]] == [(None, 0.0), (2, 2.0)]
    done = run("sae=sae_lens", "format=sae_lab", module="export", cwd=root)
    assert done.returncode == 0, done.stderr
    again = load_sae(root / "sae_lens" / "results" / "export" / "sae_lab")
    assert torch.equal(again.W_dec, load_sae(root / "sae_lens").W_dec)
    done = run("sae=[run,folder]", "names=[a,b]", module="compare", cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(next(root.glob("outputs/compare/a-b-*/compare.json")).read_text())["agreement"][
        "mean_max_cosine"
    ] == pytest.approx(1)
    assert_one_sentence(run("sae=run", "run_dir=run", module="evaluate", cwd=root), "name the same thing")
    assert_one_sentence(run("sae=run", module="compare", cwd=root), "sae=run must be a list of two SAEs or more")
    done = run("sae=sae_lens", "format=sae_lens", "n_latents=4", module="export", cwd=root)
    assert_one_sentence(done, "n_latents is of format=neuronpedia", "leave it out")
    assert_one_sentence(run("sae=[run,run]", "names=[a,a]", module="compare", cwd=root), "must differ")
