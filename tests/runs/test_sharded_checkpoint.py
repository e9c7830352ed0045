"""Checkpoints of sharded latents: resumed with any number of shards, whole at every moment, checked."""

import shutil
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint  # before processes fork, because the import takes a second
from ranks import start_ranks

from sae_lab.parallel.mesh import latent_axis, sharded_latents
from sae_lab.runs.checkpoint import check_readable
from sae_lab.runs.sharded_checkpoint import move_to_shards, take_own_latents
from sae_lab.runtime.errors import UserError
from sae_lab.saes.cross_layer import CrossLayerTopKSAE
from sae_lab.saes.weights import with_latents
from sae_lab.training.checkpoint_io import AtomicCheckpointIO

F, D = 24, 4
LAYERS = {"n_sources": 6, "normalize": "none"}  # three, which neither 2 nor 4 shards divide


def trained(step):
    """An SAE with its optimizer: the numbers depend on the step, and those of a shard are a slice of the whole's."""
    sae = CrossLayerTopKSAE(d_in=D, n_latents=F, k=2, encoder_bias=True, seed=step, **LAYERS)
    optimizer = torch.optim.Adam(sae.parameters())
    generator, axes, own = torch.Generator().manual_seed(step), sae.latent_axes(), sae.own_latents
    for name, parameter in sae.named_parameters():
        whole = torch.randn(with_latents(parameter.shape, axes.get(name), F), generator=generator)
        parameter.grad = whole[own.start : own.stop] if name in axes else whole
    optimizer.step()
    sae.batches_since_fired += torch.arange(own.start, own.stop) + step
    return sae, optimizer


def checkpoint_of(sae, optimizer, step):
    return {
        "state_dict": {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "global_step": step,
        "pytorch-lightning_version": "2",
    }


def flat(checkpoint):
    moments = {
        f"{i}.{key}": value for i, s in checkpoint["optimizer_states"][0]["state"].items() for key, value in s.items()
    }
    return {name: tensor.clone() for name, tensor in (checkpoint["state_dict"] | moments).items()}


def save(folder, step, m):
    with sharded_latents(m):
        sae, optimizer = trained(step)
        checkpoint = checkpoint_of(sae, optimizer, step)
        move_to_shards(checkpoint, sae)
        assert not any(state["exp_avg"].is_meta for state in optimizer.state.values())  # it goes on with them
        AtomicCheckpointIO(folder).save_checkpoint(checkpoint, folder / "last.ckpt")


def load(folder, m):
    with sharded_latents(m):
        sae = trained(99)[0]
        content = AtomicCheckpointIO(folder).load_checkpoint(folder / "last.ckpt", weights_only=True)
        take_own_latents(content, sae)
        return latent_axis().index, flat(content)


def whole(step):
    return flat(checkpoint_of(*trained(step), step))


def part(state, i, m):
    names = trained(0)[0].latent_axes()
    parameters = list(dict(trained(0)[0].named_parameters()))
    with_latents = {f"sae.{name}" for name in names} | {
        f"{j}.{key}" for j, name in enumerate(parameters) if name in names for key in ("exp_avg", "exp_avg_sq")
    }
    n = F // m
    return {k: t[i * n : (i + 1) * n] if k in with_latents else t for k, t in state.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Killed(BaseException):
    """The process ends here."""


def killed(*_, **__):
    raise Killed


def save_until(folder, step, m, moment, ranks):
    """Save a checkpoint; these ranks are killed at a moment. Returns what it raised."""
    if torch.distributed.get_rank() not in ranks:
        moment = "os.getpid"  # changes nothing
    try:
        with patch(moment, **({"side_effect": killed} if moment != "os.getpid" else {"wraps": lambda: 1})):
            save(folder, step, m)
    except (Killed, UserError) as e:
        return f"{type(e).__name__}: {e}"
    return "saved"


@pytest.fixture(scope="module")
def two_ranks():
    with start_ranks(2) as call:
        yield call


@pytest.mark.process
def test_any_number_of_shards_resumes_any_other_to_the_bit(tmp_path):
    with start_ranks(4) as call:
        for written in (4, 2, 1):
            folder = tmp_path / str(written)
            call(save, folder, 3, written)
            assert check_readable(folder / "last.ckpt", "") == 3
            for m in (4, 2):
                for i, state in call(load, folder, m):
                    assert_same(state, part(whole(3), i, m))
            assert_same(load(folder, 1)[1], whole(3))


MOMENTS = {
    "before any shard": ("sae_lab.runs.sharded_checkpoint.new_folder", (0, 1), 3),
    "between shards and file": ("sae_lab.training.checkpoint_io.atomic_file", (0,), 3),
    "before the file replaces the old one": ("pathlib.Path.replace", (0,), 3),
    "before the old folder is removed": ("sae_lab.training.checkpoint_io.remove_shards", (0,), 7),
    "while the old folder is removed": ("shutil.rmtree", (0,), 7),
}


@pytest.mark.process
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_between_the_writes_leaves_the_older_or_the_newer_checkpoint_whole(tmp_path, two_ranks, moment):
    target, ranks, step = MOMENTS[moment]
    two_ranks(save, tmp_path, 3, 2)
    assert two_ranks(save_until, tmp_path, 7, 2, target, ranks)[0] == "Killed: "
    assert check_readable(tmp_path / "last.ckpt", "") == step
    for i, state in two_ranks(load, tmp_path, 2):
        assert_same(state, part(whole(step), i, 2))
    two_ranks(save, tmp_path, 7, 2)
    assert_same(load(tmp_path, 1)[1], whole(7))
    assert len(list(tmp_path.glob("*.shards-*"))) == 1


@pytest.mark.process
def test_a_rank_that_cannot_write_is_named_by_all(tmp_path, two_ranks):
    two_ranks(save, tmp_path, 3, 2)
    target = "torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data"
    said = two_ranks(fail_to_write, tmp_path, target)
    assert all("last.shards-7 cannot be written: " in one and "No space left" in one for one in said)
    assert_same(load(tmp_path, 1)[1], whole(3))


def fail_to_write(folder, target):
    full = OSError(28, "No space left on device", "/a/file")
    try:
        if torch.distributed.get_rank() == 1:
            with patch(target, side_effect=full):
                save(folder, 7, 2)
        else:
            save(folder, 7, 2)
    except UserError as e:
        return str(e)
    return "saved"


def damage(folder, how):
    [shards] = folder.glob("last.shards-*")
    file = sorted(shards.iterdir())[1]
    if how == "missing":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-8])
    elif how == "of another run":
        shutil.copy(file, file.with_name("shard-00003-model-00001-of-00001.safetensors"))
    elif how == "without its folder":
        shutil.rmtree(shards)
    else:
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)


@pytest.mark.process
def test_damaged_shards_are_refused_in_a_sentence(tmp_path, two_ranks):
    two_ranks(save, tmp_path / "good", 3, 2)
    for how in ("missing", "cut off", "of another run", "without its folder"):
        shutil.copytree(tmp_path / "good", tmp_path / how)
        damage(tmp_path / how, how)
        with pytest.raises(UserError, match=r"last.shards-3/shard-0000\d-.* is .*, expected .*: type resume=never"):
            check_readable(tmp_path / how / "last.ckpt", "type resume=never.")
    damage(tmp_path / "good", "a flipped bit")
    with pytest.raises(UserError, match=r"shard-00002.* changed since the run wrote it"):
        load(tmp_path / "good", 1)
