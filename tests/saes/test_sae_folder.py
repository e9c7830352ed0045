"""SAE folders over several files: saved by shards, read whole, by slice and by other numbers of shards."""

import json
import shutil

import pytest
import torch
from conftest import build, planted
from ranks import start_ranks
from safetensors.torch import load_file, save_file

from sae_lab.interop.load import load_sae
from sae_lab.parallel.mesh import latent_axis, sharded_latents
from sae_lab.runs.export import export_sae
from sae_lab.runtime.errors import UserError
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.saes.weights import INDEX, WEIGHTS, shard_name

F = 24
FILES = ("config.json", "probe.safetensors", INDEX, *(shard_name(i, 4) for i in range(4)))


def whole_sae():
    """An SAE whose every tensor has numbers of its own."""
    sae = build("batch_topk", "k=4", "sae.encoder_bias=true", "sae.normalize=none", n_latents=F).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) if name != "threshold" else tensor + 0.1)
    return sae


def rows():
    return planted(8, build("batch_topk", n_latents=F).d_in)[0]


def save_shards(plain, folder, m):
    """Save the SAE of the folder `plain` by m ranks."""
    with sharded_latents(m):
        save_sae(load_sae_folder(plain), folder, probe_rows=rows())


def load_shard(folder, m):
    with sharded_latents(m):
        sae = load_sae_folder(folder)
        return latent_axis().index, {name: tensor.clone() for name, tensor in sae.state_dict().items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same SAE in one file and by four shards, what ranks read of either, and an SAE that two shards overwrote."""
    root = tmp_path_factory.mktemp("folders")
    plain, sharded, again = (root / name for name in ("plain", "sharded", "again"))
    for folder in (plain, again):
        save_sae(whole_sae(), folder, probe_rows=rows())
    with start_ranks(4) as call:
        call(save_shards, plain, sharded, 4)
        read = {(folder.name, m): call(load_shard, folder, m) for folder in (plain, sharded) for m in (2, 4)}
        call(save_shards, plain, again, 4)
    return plain, sharded, again, read


def part_of(sae, own):
    axes = sae.latent_axes()
    return {
        name: t.narrow(axes[name], own.start, len(own)) if name in axes else t for name, t in sae.state_dict().items()
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.process
def test_shards_are_read_whole_by_slice_and_by_shards_to_the_bit(folders):
    plain, sharded, _, read = folders
    sae = whole_sae()
    for folder in (plain, sharded):
        assert_same(load_sae(folder).state_dict(), sae.state_dict())
        for own in (range(0, 6), range(5, 13), range(0, F)):
            part = load_sae(folder, latents=own)
            assert part.own_latents == own
            assert_same(part.state_dict(), part_of(sae, own))
            assert torch.equal(part.encode(rows()), sae.encode(rows())[:, own.start : own.stop])
        for m in (2, 4):
            for i, state in read[folder.name, m]:
                assert_same(state, part_of(sae, range(i * F // m, (i + 1) * F // m)))


@pytest.mark.process
def test_the_index_is_one_that_users_of_safetensors_can_read(folders):
    sharded = folders[1]
    assert sorted(file.name for file in sharded.iterdir()) == sorted(FILES)
    index = json.loads((sharded / INDEX).read_text())
    tensors = {key: load_file(sharded / file)[key] for key, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    parts = [tensors[f"W_enc[{i}:{i + 6}]"] for i in range(0, F, 6)]
    assert torch.equal(torch.cat(parts), whole_sae().W_enc)
    assert torch.equal(tensors["b_dec"], whole_sae().b_dec)


@pytest.mark.process
def test_an_sae_that_is_saved_again_leaves_no_file_of_the_one_before(folders):
    again = folders[2]
    assert sorted(file.name for file in again.iterdir()) == sorted(FILES)
    assert_same(load_sae(again).state_dict(), whole_sae().state_dict())


@pytest.mark.process
def test_an_export_to_our_format_copies_every_file(folders, tmp_path):
    export_sae(folders[1], "sae_lab", tmp_path)
    assert {*FILES, "README.md"} == {file.name for file in tmp_path.iterdir()}
    assert_same(load_sae(tmp_path).state_dict(), whole_sae().state_dict())


def rename_key(file, key, other):
    tensors = load_file(file)
    tensors[other] = tensors.pop(key)
    save_file(tensors, file)


def without_digests(folder):
    description = json.loads((folder / "config.json").read_text())
    del description["digests"]
    (folder / "config.json").write_text(json.dumps(description))


def reindex(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


SECOND = shard_name(1, 4)


def overlap(folder):
    rename_key(folder / SECOND, "W_enc[6:12]", "W_enc[5:11]")
    reindex(folder, lambda keys: keys.update({"W_enc[5:11]": keys.pop("W_enc[6:12]")}))


def leave_out(folder):
    for name in ("W_enc", "W_dec", "b_enc", "batches_since_fired"):
        reindex(folder, lambda keys, name=name: keys.pop(f"{name}[18:24]"))


DAMAGE = {
    "a missing shard": (lambda f: (f / SECOND).unlink(), "sae-00002-of-00004.safetensors is missing, which"),
    "a file that is not there": (
        lambda f: reindex(f, lambda keys: keys.update({"b_dec": shard_name(8, 9)})),
        "sae-00009-of-00009.safetensors is missing, which",
    ),
    "a file elsewhere": (lambda f: reindex(f, lambda keys: keys.update({"b_dec": "../a"})), "does not map tensors to"),
    "shards mixed": (lambda f: shutil.copy(f / shard_name(2, 4), f / SECOND), r"W_dec\[6:12\] is in no file, but"),
    "cut off": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-8]), "cannot be read"),
    "overlapping": (overlap, "the parts of W_enc overlap at 5"),
    "latents left out": (leave_out, "has shape|leave latents out"),
    "another shape": (
        lambda f: rename_key(f / SECOND, "W_enc[6:12]", "W_enc[6:13]"),
        r"W_enc\[6:13\] of sae-00002-of-00004.safetensors has the shape",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_of_shards_is_refused_in_a_sentence(folders, tmp_path, how):
    folder = shutil.copytree(folders[1], tmp_path / "sae")
    without_digests(folder)
    change, message = DAMAGE[how]
    change(folder)
    with pytest.raises(UserError, match=message) as e:
        load_sae(folder)
    assert "\n" not in str(e.value)


@pytest.mark.process
@pytest.mark.parametrize("file", [INDEX, SECOND, shard_name(0, 4)])
def test_a_flipped_bit_is_noticed_by_whoever_reads_it(folders, tmp_path, file):
    folder = shutil.copytree(folders[1], tmp_path / "sae")
    content = bytearray((folder / file).read_bytes())
    content[-4] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(UserError):
        load_sae(folder)
    with pytest.raises(UserError):
        load_sae(folder, latents=range(6, 8))
    if file == SECOND:
        load_sae(folder, latents=range(12, 24))  # does not read it


def test_a_slice_that_there_is_not_is_refused(tmp_path):
    save_sae(whole_sae(), tmp_path / "sae")
    for latents in (range(0, 25), range(0, 24, 2), range(3, 3)):
        with pytest.raises(UserError, match="is no part of 24 latents: give such as range"):
            load_sae(tmp_path / "sae", latents=latents)
    with pytest.raises(UserError, match="holds latents 0 to 5 of 24 only"):
        save_sae(load_sae(tmp_path / "sae", latents=range(6)), tmp_path / "part")
    save_file({"W": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="of an SAE folder of this library only"):
        load_sae(tmp_path / "x.safetensors", latents=range(6))
    assert not (tmp_path / "part").exists()
    assert (tmp_path / "sae" / WEIGHTS).is_file()
