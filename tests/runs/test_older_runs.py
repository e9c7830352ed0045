"""Runs and SAEs that commit eac9ea5 wrote, before modules moved into rooms: they load, evaluate and resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file

from sae_lab import load_sae
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.runs.config import ADDED, MOVED, bring_up_to_date, read_config
from sae_lab.runs.folder import raise_if_config_differs
from sae_lab.runs.loading import load_run
from sae_lab.runtime.errors import UserError
from sae_lab.training.run import train_run

FIXTURES = Path(__file__).parent / "fixtures" / "eac9ea5"
WRITTEN_ON = "AuthenticAMD 26 2, torch 2.13.0"  # where the bits are the same, too
OVERRIDES = [
    *("data=text_files", "data.paths=[text.md]", "data.order=as_read", "n_latents=32", "k=4", "seq_len=32"),
    "batch_size=64",
    *("n_tokens=12800", "calibration_batches=4", "data.n_eval_tokens=512", "data.n_val_tokens=256"),
    *("data.lm_batch_rows=8", "data.block_tokens=4096", "trainer.accelerator=cpu", "trainer.checkpoint_every=100"),
    *("trainer.validate_every=100", "sae.normalize=mean_norm", "optimizer.lr=1e-3", "schedule=constant"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The runs, in a folder that a test may write into and that holds their text."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def this_machine() -> str:
    """Processor and torch decide the last bits; the name of a processor may be that of several."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    about = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    processor = " ".join(about.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return f"{processor}, torch {torch.__version__.partition('+')[0]}"


def test_a_stopped_run_resumes_to_what_it_would_have_been(folder):
    metrics = train_run(compose(*OVERRIDES, f"run_dir={folder / 'stopped'}"))
    there, here = (load_file(folder / run / "sae" / "sae.safetensors") for run in ("finished", "stopped"))
    here = {name.replace("sources.", ""): tensor for name, tensor in here.items()}
    assert here.keys() == there.keys()
    exact = {"rtol": 0, "atol": 0} if this_machine() == WRITTEN_ON else {"rtol": 1e-3, "atol": 1e-4}
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, **exact, msg=name)
    finished = json.loads((folder / "finished" / "metrics.json").read_text())
    assert metrics["fvu"] == pytest.approx(finished["fvu"], rel=1e-12 if exact["rtol"] == 0 else 1e-3)


def test_a_finished_run_is_evaluated_to_the_same_metrics(folder):
    sae, data, cfg = load_run(folder / "finished", device="cpu")
    assert cfg.data._target_ == "sae_lab.activations.from_text.text_files"
    there = json.loads((folder / "finished" / "metrics.json").read_text())
    here = evaluate(sae, data).metrics
    if this_machine() == WRITTEN_ON:
        assert here.items() <= there.items()
    for rule, metrics in ((here, there), (here["train_mode"], there["train_mode"])):
        assert {name for name, value in metrics.items() if isinstance(value, float)} <= rule.keys()
        for name in ("fvu", "nmse", "l0", "cosine_similarity", "ce_clean", "ce_spliced", "ce_zero", "kl"):
            assert rule[name] == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.parametrize("name", sorted(path.name for path in (FIXTURES / "saes").iterdir()))
def test_an_sae_folder_loads_and_computes_what_its_probe_says(name):
    sae, probe = load_sae(FIXTURES / "saes" / name), load_file(FIXTURES / "saes" / name / "probe.safetensors")
    x_hat, code = sae.autoencode(probe["x"])
    torch.testing.assert_close(x_hat.flatten(1), probe["x_hat"], rtol=1e-4, atol=1e-4)
    dense = code if isinstance(code, torch.Tensor) else code.to_dense()
    rows, latents = probe["entries"].long().unbind(1)
    torch.testing.assert_close(dense[rows, latents], probe["values"], rtol=1e-4, atol=1e-4)


def test_every_target_that_moved_can_be_imported_under_its_new_name():
    from hydra.utils import get_object

    assert all(callable(get_object(new)) for new in MOVED.values())


def test_another_target_is_still_refused(folder):
    config = read_config(folder / "finished")
    raise_if_config_differs(folder, config, config)
    theirs = {"schedule": {"_target_": MOVED["sae_lab.schedule.warmup_decay"]}}
    with pytest.raises(UserError, match=r"schedule\._target_ is sae_lab\.training\.schedule\S+ there and mine"):
        raise_if_config_differs(folder, theirs, {"schedule": {"_target_": "mine"}})


def test_settings_added_since_have_the_value_that_means_as_before(monkeypatch):
    monkeypatch.setitem(ADDED, "sae_lab.activations.from_text.", {"order": "as_read", "seed": 7})
    old = {"data": {"_target_": "sae_lab.data.stdlib", "seed": 1}, "sae": {"_target_": "a.B", "seed": 0}}
    data = {"_target_": "sae_lab.activations.from_text.stdlib", "order": "as_read", "seed": 1}
    assert bring_up_to_date(old) == {"data": data, "sae": old["sae"]}
