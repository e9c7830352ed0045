"""The scripts in examples/ run, cell by cell in one namespace, and end with what they promise."""

import runpy

import pytest
import torch

from sae_lab.cli.help import CONF

EXAMPLES = CONF.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_run_and_named_in_the_docs():
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"train_and_look", "pretrained_and_pursuit", "crosscoder_of_two_models"}
    page = (EXAMPLES.parent / "docs" / "python-api.md").read_text()
    assert [name for name in names if f"examples/{name}.py" not in page] == []


def test_train_and_look(run, capsys):
    left = run("train_and_look")
    assert left["code"].shape == (1, left["tokens"].shape[1], 512)
    assert left["run"].metrics["loss_recovered"] > 0.5
    torch.testing.assert_close(left["mine"].W_dec.flatten(1).norm(dim=1), torch.ones(256))
    assert left["mine"].threshold > 0
    assert "loss" in capsys.readouterr().out


def test_pretrained_and_pursuit(run):
    left = run("pretrained_and_pursuit")
    fvu = {name: values["fvu"] for name, values in left["found"].items()}
    assert fvu["orthogonal_matching_pursuit"] < fvu["matching_pursuit"]
    assert fvu["gradient_pursuit"] < fvu["encoder"]
    assert torch.equal(left["new"].W_dec, left["sae"].W_dec)  # the dictionary is given
    assert not torch.equal(left["new"].W_enc, left["mlp"].W_enc)


def test_crosscoder_of_two_models(run):
    left = run("crosscoder_of_two_models")
    assert left["pair"].sites == ("base.transformer.h.3", "tuned.transformer.h.3")
    assert {"fvu_0", "fvu_1", "latents_shared"} <= left["run"].metrics.keys()
    assert left["code"].shape == (*left["tokens"].shape, 512)
