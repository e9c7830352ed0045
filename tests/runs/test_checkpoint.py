"""SAE folders that cannot be trusted are refused, each with one sentence; files appear whole or not at all."""

import json

import pytest
import torch
from conftest import build, forget_digests
from safetensors.torch import load_file, save_file

from sae_lab.runs.checkpoint import check_readable
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.training.checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def folder(tmp_path):
    return forget_digests(save_sae(build("batch_topk"), tmp_path / "run" / "sae"))


def edit(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def retensor(folder, change) -> None:
    tensors = load_file(folder / "sae.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")


def test_a_run_folder_loads_its_sae(folder):
    assert torch.equal(load_sae_folder(folder).W_enc, load_sae_folder(folder.parent).W_enc)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "sae.safetensors").write_bytes(b"1234"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be read"),
        (lambda f: edit(f, lambda c: c.update({"class": ["a"]})), "cannot be read"),
        (lambda f: edit(f, lambda c: c["config"].update(k=65)), "k=65 must lie between 1 and the dictionary's 64"),
        (lambda f: retensor(f, lambda t: t["b_dec"].fill_(torch.nan)), r"b_dec not finite\): save or copy it again"),
        (lambda f: edit(f, lambda c: c.update({"class": "os.system"})), "there is no SAE class 'os.system'"),
        (lambda f: edit(f, lambda c: c["config"].update(gamma=3)), "cannot be built from this config"),
        (lambda f: edit(f, lambda c: c["config"].update(n_latents=65)), "do not fit"),
        (lambda f: retensor(f, lambda t: t.update(scale=torch.ones(1))), "do not fit"),
        (lambda f: retensor(f, lambda t: t.pop("threshold")), "do not fit"),
    ],
)
def test_a_damaged_folder_is_refused(folder, break_it, sentence):
    break_it(folder)
    with pytest.raises(UserError, match=sentence):
        load_sae_folder(folder)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_load_without_running_code(tmp_path):
    AtomicCheckpointIO(tmp_path).save_checkpoint({"global_step": 3, "w": torch.ones(2)}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def flip(path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: flip(p, 0.5), "is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-50]), "cannot be read"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: torch.save({"global_step": 3}, p), "lacks pytorch-lightning_version and state_dict"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, reason):
    path = tmp_path / "last.ckpt"
    content = {"global_step": 3, "state_dict": {"w": torch.ones(5000)}, "pytorch-lightning_version": "2.6.6"}
    AtomicCheckpointIO(tmp_path).save_checkpoint(content, path)
    assert check_readable(path, "delete it.") == 3
    damage(path)
    with pytest.raises(UserError, match=f"{reason}.*delete it"):
        check_readable(path, "delete it.")


def test_an_unfinished_run_is_told_from_no_run(tmp_path):
    (tmp_path / ".hydra").mkdir()
    with pytest.raises(UserError, match="has not saved its SAE yet: run the same command again"):
        load_sae_folder(tmp_path)
