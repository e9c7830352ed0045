"""Damaged files of an SAE and of a cache are told in one sentence, and nothing of them is used."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import build, planted
from damage import KINDS, damage
from fakes import SETTINGS, Echo, data

from sae_lab.cache.data import CachedData
from sae_lab.cache.reader import Cache
from sae_lab.cache.shards import HELD_OUT_FILE, MANIFEST
from sae_lab.cache.writer import CacheWriter
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_json
from sae_lab.saes.files import CONFIG, PROBE, WEIGHTS, load_sae_folder, save_sae


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    sae = build("batch_topk", "sae.normalize=none")
    return save_sae(sae, tmp_path_factory.mktemp("saved") / "sae", {"seed": 1}, planted(8)[0])


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PROBE])
@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_bit_of_an_sae_is_noticed(saved, tmp_path, name, seed):
    folder = shutil.copytree(saved, tmp_path / "sae")
    before = json.loads((folder / CONFIG).read_text())
    flip(folder / name, random.Random(seed).randrange(8 * (folder / name).stat().st_size))
    if name == CONFIG and _says_the_same(folder, before):
        return  # a bit of white space
    with pytest.raises(UserError):
        load_sae_folder(folder)


def _says_the_same(folder: Path, before: dict) -> bool:
    try:
        return json.loads((folder / CONFIG).read_text()) == before
    except ValueError:
        return False


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PROBE])
@pytest.mark.parametrize("damage", ["cut", "emptied", "missing", "foreign", "longer"])
def test_a_damaged_file_of_an_sae_is_noticed(saved, tmp_path, name, damage):
    folder = shutil.copytree(saved, tmp_path / "sae")
    other = save_sae(build("batch_topk", "sae.normalize=none", "seed=5"), tmp_path / "other", {}, planted(8, seed=2)[0])
    file = folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        new = {"cut": content[: len(content) // 2], "emptied": b"", "longer": content + b"\n{}"}
        file.write_bytes(new[damage] if damage in new else (other / name).read_bytes())
    with pytest.raises(UserError):
        load_sae_folder(folder)


def test_an_sae_without_digests_loads_and_says_that_it_cannot_be_checked(saved, tmp_path, caplog):
    folder = shutil.copytree(saved, tmp_path / "sae")
    description = json.loads((folder / CONFIG).read_text())
    del description["digests"]
    (folder / CONFIG).write_text(json.dumps(description))
    load_sae_folder(folder)
    assert "saved without digests" in caplog.text


def test_a_declared_size_is_compared_before_memory_is_taken(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "sae")
    description = json.loads((folder / CONFIG).read_text())
    del description["digests"]
    description["config"]["n_latents"] = 2_000_000_000
    (folder / CONFIG).write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"expected \(2000000000, 1, 16\)|expected \(2000000000,\)|takes 119 GiB"):
        load_sae_folder(folder)


@pytest.fixture
def cache(tmp_path) -> Path:
    CacheWriter(data(), str(tmp_path / "cache"), 96, 24).build()
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [MANIFEST, "shard-00001.safetensors", HELD_OUT_FILE])
def test_a_damaged_file_of_a_cache_is_told(caches, tmp_path, name, kind):
    ours, other = caches
    folder = shutil.copytree(ours, tmp_path / "cache")
    damage(folder / name, kind, (other / name).read_bytes())
    with pytest.raises(UserError) as told:
        use_all(folder)
    assert "\n" not in str(told.value)


def use_all(folder: Path) -> None:
    """Read every row and the held-out text, as a run does."""
    CachedData(Echo(), str(folder), **SETTINGS).new_stream()
    cache = Cache(str(folder))
    for i in range(cache.n_pieces):
        cache.piece(i)
    cache.held_out()


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> tuple[Path, Path]:
    """A cache, and one of other rows."""
    parent = tmp_path_factory.mktemp("caches")
    for name, settings in (("cache", {}), ("other", {"seq_len": 5})):
        CacheWriter(data(**settings), str(parent / name), 96, 24).build()
    use_all(parent / "cache")
    return parent / "cache", parent / "other"


def test_two_shards_of_one_size_cannot_be_swapped(cache):
    shards = json.loads((cache / MANIFEST).read_text())["shards"]
    first, second = (cache / shard["file"] for shard in shards[:2])
    assert first.stat().st_size == second.stat().st_size
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged"):
        Cache(str(cache)).piece(0)


@pytest.mark.parametrize(
    "name", ["../victim.safetensors", "/tmp/victim.safetensors", "shard-00007.safetensors", ".lock"]
)
def test_a_manifest_names_no_other_files(cache, name):
    victim = cache.parent / "victim.safetensors"
    victim.write_text("mine")
    manifest = json.loads((cache / MANIFEST).read_text())
    manifest["shards"][0]["file"] = name
    (cache / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Cache(str(cache))
    CacheWriter(data(), str(cache), 96, 24).build(rebuild=True)
    assert victim.read_text() == "mine"
    assert len(Cache(str(cache)).piece(0)) == 24


def test_a_link_is_not_followed(cache, tmp_path):
    shard = cache / "shard-00000.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="leads out of its folder"):
        Cache(str(cache)).piece(0)


def test_a_cache_still_trains(cache):
    assert len(next(CachedData(Echo(), str(cache), **SETTINGS).new_stream())) == SETTINGS["batch_size"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(rows=-5),
        lambda m: m["shards"][0].update(rows="x"),
        lambda m: m["shards"][0].update(size=1.5),
        lambda m: m.update(shards=[]),
        lambda m: m.update(key=[]),
        lambda m: m["key"].pop("dtype"),
        lambda m: m.update(complete="no"),
    ],
)
def test_a_manifest_with_values_that_no_cache_has_is_damaged(cache, change):
    """Also where its digest fits."""
    manifest = json.loads((cache / MANIFEST).read_text())
    del manifest["digest"]
    change(manifest)
    (cache / MANIFEST).write_text(json.dumps(manifest | {"digest": digest_of_json(manifest)}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Cache(str(cache))


def test_a_manifest_without_its_digest_is_damaged(cache):
    manifest = json.loads((cache / MANIFEST).read_text())
    del manifest["digest"]
    (cache / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Cache(str(cache))
