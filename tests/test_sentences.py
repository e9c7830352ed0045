"""Sentences about what was typed, without starting a command."""

import pytest
import torch
from conftest import compose

from sae_lab import load_sae
from sae_lab.cli.entry import check_flags
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


def test_a_device_is_named_by_the_key_that_was_typed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^trainer\.accelerator=gpu is not available"):
        check_options(compose("run_dir=x", "trainer.accelerator=gpu"))
    save_sae(TopKSAE(k=2, d_in=4, n_latents=8), tmp_path)
    with pytest.raises(UserError, match=r"^device=cuda is not available"):
        load_sae(tmp_path, device="cuda")
