"""What a saved SAE says of itself, and the probe by which a changed one is refused."""

import json

import pytest
import torch
from conftest import build, compose, forget_digests, planted
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from sae_lab import load_sae
from sae_lab.runs import provenance
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE
from sae_lab.saes.files import save_sae


@pytest.fixture
def x():
    return planted(16)[0] + 0.1


@pytest.mark.parametrize("n_sources", [1, 3])
def test_every_sae_reproduces_its_probe(sae_name, n_sources, tmp_path):
    rows = planted(16, n_sources=n_sources)[0]
    sae = build(sae_name, n_sources=n_sources)
    sae(rows)
    folder = save_sae(sae, tmp_path, probe_rows=rows)
    assert sae.training
    probe = load_file(folder / "probe.safetensors")
    sae.eval()
    torch.testing.assert_close(probe["x_hat"].view_as(rows), sae.reconstruct(rows))
    assert len(probe["values"]) == (sae.encode(rows) != 0).sum()
    assert torch.equal(load_sae(folder).encode(rows), sae.encode(rows))


def change_weights(folder, change):
    tensors = load_file(folder / "sae.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")


def change_config(folder, **change):
    description = json.loads((folder / "config.json").read_text())
    description["config"] |= change
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: change_weights(f, lambda t: t["threshold"].mul_(1.5)),
        lambda f: change_weights(f, lambda t: t["b_dec"].add_(0.1)),
        lambda f: change_weights(f, lambda t: t["W_dec"].mul_(1.01)),
        lambda f: change_config(f, normalize="none"),
    ],
)
def test_an_sae_that_changed_is_refused(change, x, tmp_path):
    sae = build("batch_topk")
    sae(x)
    folder = forget_digests(save_sae(sae, tmp_path, probe_rows=x))
    change(folder)
    with pytest.raises(UserError, match=r"does not reproduce its own codes \(\d+ of 16 probe rows\)"):
        load_sae(folder)


def test_a_library_that_changed_is_refused(x, tmp_path, monkeypatch):
    folder = save_sae(build("batch_topk"), tmp_path, probe_rows=x)
    rule = BatchTopKSAE.select
    monkeypatch.setattr(BatchTopKSAE, "select", lambda self, h: rule(self.train(), h))
    with pytest.raises(UserError, match="does not reproduce"):
        load_sae(folder)


def test_a_tie_that_rounding_decides_is_none_of_that(x, tmp_path):
    folder = forget_digests(save_sae(build("topk"), tmp_path, probe_rows=x))
    probe = load_file(folder / "probe.safetensors")
    probe["x_hat"][3] += 1
    save_file(probe, folder / "probe.safetensors")
    load_sae(folder)


def test_a_lost_probe_is_said(x, tmp_path):
    folder = save_sae(build("topk"), tmp_path, probe_rows=x)
    (folder / "probe.safetensors").unlink()
    with pytest.raises(UserError, match=r"probe\.safetensors"):
        load_sae(folder)


def test_provenance_names_model_text_and_code():
    cfg = compose("data.block_tokens=20_000", "lm.device=cpu")
    data = instantiate(cfg.data, lm=instantiate(cfg.lm))
    said = provenance.provenance(OmegaConf.to_container(cfg, resolve=False) | {"data": dict(cfg.data)}, data.origin())
    assert said["model"] == {"name": "tiny", "revision": None, "processing": "none"}
    assert said["sites"] == ["transformer.h.2"]
    assert said["bos"]["id"] == data.lm.bos_id
    assert said["tokenizer"]["vocab_size"] == len(data.lm.tokenizer)
    assert set(said["versions"]) >= {"sae-lab", "torch", "transformers"}
    assert len(said["commit"].removesuffix("-dirty")) == 40
    assert data.probe_rows().shape == (16, 1, 128)


def test_a_probe_of_latents_that_are_not_there_is_said(x, tmp_path):
    forget_digests(save_sae(build("topk"), tmp_path, {}, x))
    probe = load_file(tmp_path / "probe.safetensors")
    save_file(probe | {"entries": torch.full_like(probe["entries"], 10**6)}, tmp_path / "probe.safetensors")
    with pytest.raises(UserError, match=r"cannot be read \(IndexError"):
        load_sae(tmp_path)
