"""Sentences about what was typed, without starting a command."""

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf

from sae_lab import load_sae
from sae_lab.cli.entry import check_flags, run_or_explain
from sae_lab.cli.help import CONF
from sae_lab.cli.unknown_key import PEERS, check_added, leaves, unknown_key
from sae_lab.runtime.errors import UserError
from sae_lab.saes.files import save_sae
from sae_lab.saes.topk import TopKSAE
from sae_lab.training.options import check_options


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(["k=1", "--cfg", "job", "x=2"], "--cfg job"), (["k=1", "-m", "k=1", "x=2"], "-m"), (["k=1", "-m", "k=1"], "-m")],
)
def test_the_option_that_stands_between_settings_is_named(arguments, option):
    with pytest.raises(UserError, match=rf" stands behind an option: put {option} before all settings\.$"):
        check_flags(arguments)


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "n_eval_tokens": "data.n_eval_tokens",
        "lr": "optimizer.lr",
        "sae.lr": "optimizer.lr",
        "optimizer.learning_rate": "optimizer.lr",
        "l1_coefficient": "sae.l1_coefficient",
        "d_sae": "n_latents",
        "layer": "lm.sites",
        "hook_name": "lm.sites",
        "context_size": "seq_len",
        "device": "trainer.accelerator",
        "dataset_path": "data=NAME",
    }.items(),
)
def test_a_key_is_found_where_it_is_and_by_its_name_elsewhere(typed, meant):
    """Also beside another key that is wrong."""
    parent, _, leaf = typed.rpartition(".")
    sentence = f"{parent or 'the config'} has no key {leaf}: did you mean {meant}?"
    assert unknown_key(typed, "train", [f"{typed}=1", "nokey=2", "sae=topk"]) == sentence


def test_a_key_is_added_only_where_something_reads_it():
    added = {"optimizer.amsgrad": True, "optimizer.nokey": False, "sae.nokey": False, "nokey": False}
    added |= {"lm.load.nokey": True, "callbacks.nokey": True}
    typed = ["lm.load={a: 1}", "callbacks=keep_best"]
    assert {k: "adds it" in unknown_key(k, "train", [f"{k}=1", *typed]) for k in added} == added


def test_what_is_known_elsewhere_is_known_here():
    keys = {k for n in ("topk", "vanilla") for k, _ in leaves(OmegaConf.to_container(compose(f"sae={n}")))}
    groups = [folder.name for folder in CONF.iterdir()]
    assert {ours for ours in PEERS.values() if ours not in keys and ours.partition("=")[0] not in groups} == set()


def test_an_added_key_that_nothing_reads_is_refused():
    typed = ["+n_eval_tokens=16_384"]
    with pytest.raises(UserError, match=r"has no key n_eval_tokens: did you mean data\.n_eval_tokens\?$"):
        check_added(compose(*typed), "train", typed)
    for fine in (["+width=512", "n_latents=${width}"], ["++k=3"], ["+optimizer.amsgrad=true"], ["+preset=gpu"]):
        check_added(compose(*fine), "train", fine)


def test_an_import_that_ctrl_c_cut_short_is_no_mistake(capsys):
    def imports() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as e:
            raise ImportError("torch cannot be imported") from e

    with pytest.raises(SystemExit, match="130"):
        run_or_explain(imports, "train")
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_device_is_named_by_the_key_that_was_typed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^trainer\.accelerator=gpu is not available"):
        check_options(compose("run_dir=x", "trainer.accelerator=gpu"))
    save_sae(TopKSAE(k=2, d_in=4, n_latents=8), tmp_path)
    with pytest.raises(UserError, match=r"^device=cuda is not available"):
        load_sae(tmp_path, device="cuda")
