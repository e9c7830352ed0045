"""The cache on disk: what it holds, what it refuses, how it is read, and what becomes of it when things go wrong."""

import errno
import json
import os
import signal
import subprocess
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
import torch
import xxhash
from fakes import Follow, UniqueWords
from safetensors.torch import save

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.cache import store
from sae_lab.cache.data import CachedData
from sae_lab.cache.key import data_key
from sae_lab.cache.reader import Cache, CachedSource
from sae_lab.cache.shards import PIECE
from sae_lab.cache.writer import CacheWriter
from sae_lab.runtime.errors import UserError
from sae_lab.text.corpora import FileDocuments

CPU = torch.device("cpu")
SETTINGS = {
    "seq_len": 8,
    "batch_size": 16,
    "n_tokens": 512,
    "block_tokens": 300,
    "lm_batch_rows": 4,
    "exclude_bos": True,
    "exclude_first": 0,
    "pack": True,
    "prefetch": False,
    "repeat": False,
    "n_eval_tokens": 160,
    "n_val_tokens": 80,
    "seed": 0,
}
N = 600  # rows of the caches below, in shards of about 200


def text(lm=None, n_documents: int = 90, **changes) -> ActivationData:
    return from_documents(
        lm or Follow(), partial(UniqueWords, n_documents=n_documents), **({"order": "shuffled"} | SETTINGS | changes)
    )


def harvester(path, n_tokens: int = N, dtype: str = "auto", **changes) -> CacheWriter:
    return CacheWriter(text(**changes), str(path), n_tokens, shard_tokens=200, dtype=dtype)


def cached(path, lm=None, **changes) -> CachedData:
    return CachedData(lm or Follow(), str(path), **(SETTINGS | changes))


@pytest.fixture
def whole(tmp_path) -> Path:
    harvester(tmp_path / "whole").build()
    return tmp_path / "whole"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def streamed_rows(**changes) -> torch.Tensor:
    return torch.cat([chunk.rows for chunk in text(**changes).source()])


# ---- contents


def test_a_cache_holds_the_streams_rows_in_order_exactly_as_many_as_asked_for(whole):
    cache = Cache(str(whole))
    rows = torch.cat([cache.piece(i) for i in range(cache.n_pieces)])
    assert torch.equal(rows, streamed_rows()[:N])
    assert [shard.text_rows for shard in cache.manifest.shards] == [29, 29, 28, 29]  # 200 / 7, and 86 = 600 / 7 in all
    assert all(shard.rows <= 203 for shard in cache.manifest.shards)
    tokens = torch.cat([cache.shard(i).tokens for i in range(4)])
    assert torch.equal(tokens.flatten()[tokens.flatten() != 0][:N].float(), rows[:, 0, 0])
    assert torch.equal(cache.held_out().int(), text().text.rows("held_out", repeat=False).take(20).int())


@pytest.mark.parametrize("n", [1, 12, 10**6])
def test_a_cache_gives_the_text_that_it_was_harvested_from(whole, n):
    """For feature pages; of a pass through it, only so much as was harvested."""
    there, here = cached(whole).text.first_rows(n), text().text.first_rows(n)
    assert torch.equal(there, here[: len(there)])
    assert len(there) == min(n, sum(shard.text_rows for shard in Cache(str(whole)).manifest.shards))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_dtype_keeps_the_rows_to_its_precision(tmp_path, dtype):
    harvester(tmp_path, dtype=dtype).build()
    cache = Cache(str(tmp_path))
    rows = torch.cat([cache.piece(i) for i in range(cache.n_pieces)])
    assert rows.dtype == getattr(torch, dtype)
    assert torch.equal(rows, streamed_rows()[:N].to(rows.dtype))
    assert cached(tmp_path).d_in == 3


def test_rows_that_the_dtype_cannot_hold_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"of a are not finite in \d+ of \d+ rows \(float16\): give dtype=bf"):
        harvester(tmp_path, dtype="float16", lm=Follow(scale=1000.0)).build()


def test_text_that_ends_ends_the_cache(tmp_path, caplog):
    manifest = harvester(tmp_path, n_tokens=10**6).build()
    assert manifest.complete
    assert manifest.rows == len(streamed_rows())
    assert f"The text ended after {manifest.rows:,} of 1,000,000 tokens" in caplog.text


def test_a_remote_cache_is_the_same(whole, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "copies"))
    harvester("memory://there/cache").build()
    there = fsspec.filesystem("memory")
    assert {Path(p).name: there.cat_file(p) for p in there.ls("/there/cache", detail=False)} == files(whole)
    ours = list(cached(whole).stream)
    for copies_gb in (1.0, 1e-5, 0.0):  # of 20 kB
        theirs = list(cached("memory://there/cache", copies_gb=copies_gb).stream)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert len(list((tmp_path / "copies" / "shards").iterdir())) == 4
    there.rm("/there", recursive=True)


# ---- reading


def test_a_pass_gives_every_row_once_in_an_order_of_its_own(whole):
    passes, stream = [], CachedSource(Cache(str(whole)), 256, 0, True, CPU)
    chunks = iter(stream)
    for _ in range(3):
        rows = torch.empty(0, 2, 3)
        while len(rows) < N:
            rows = torch.cat([rows, next(chunks).rows])
        passes.append(rows[:, 0, 0].tolist())
    assert [sorted(ids) for ids in passes] == [sorted(streamed_rows()[:N, 0, 0].tolist())] * 3
    assert passes[0] != passes[1] != passes[2]


def test_the_first_rows_of_a_pass_come_from_all_shards(whole):
    cache = Cache(str(whole))
    ends = [shard.rows for shard in cache.manifest.shards]
    shards = [set(part[:, 0, 0].tolist()) for part in streamed_rows()[:N].split(ends)]
    firsts = [next(iter(CachedSource(cache, 5 * PIECE, seed, True, CPU))).rows[:, 0, 0].tolist() for seed in range(8)]
    assert any(all(shard & set(first) for shard in shards) for first in firsts)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_resumed_run_reads_on_exactly(whole, prefetch):
    plain = cached(whole, repeat=True)
    batches = [next(plain.stream) for _ in range(100)]  # more than two passes
    for given in range(0, 100, 7):
        before = cached(whole, repeat=True, prefetch=prefetch)
        for _ in range(given):
            next(before.stream)
        after = cached(whole, repeat=True, prefetch=not prefetch)
        after.load_state_dict(before.state_dict())
        assert torch.equal(next(after.stream), batches[given])
        before.teardown("fit")
        after.teardown("fit")


def test_held_out_rows_are_those_of_the_stream(whole):
    assert torch.equal(cached(whole).held_out_rows(80), text().held_out_rows(80))
    with pytest.raises(UserError, match=r"holds only 160 held-out tokens: lower data\.n_eval_tokens"):
        cached(whole).held_out_rows(1000)


# ---- the format of before


def as_format_2(folder: Path) -> None:
    """Write a cache's shards and manifest as they were before format 3."""
    before = Cache(str(folder))
    manifest = before.manifest
    for i, shard in enumerate(manifest.shards):
        rows = torch.cat([before.shard(i).piece(k) for k in range(shard.pieces)])
        sums = [xxhash.xxh3_64_intdigest(piece.numpy().tobytes()) for piece in rows.split(PIECE)]
        checksums = torch.tensor(sums, dtype=torch.uint64).view(torch.int64)
        tensors = {"activations": rows, "tokens": before.shard(i).tokens.clone(), "checksums": checksums}
        content, index = (
            save(tensors),
            xxhash.xxh3_128(f"{rows.dtype} {(*rows.shape,)} {(shard.text_rows, 8)}".encode()),
        )
        for name in ("tokens", "checksums"):
            index.update(tensors[name].numpy().tobytes())
        (folder / shard.file).unlink()  # the old one stays mapped
        (folder / shard.file).write_bytes(content)
        of_file = {"size": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}
        manifest.shards[i] = shard._replace(**of_file, index_checksum=index.hexdigest())
    manifest.key["format"] = 2
    for name in ("compression",):
        manifest.key.pop(name)
    manifest.write(store.Store(folder))


def test_a_cache_of_format_2_is_read_and_gives_the_same_batches(whole):
    batches = list(cached(whole).stream)
    as_format_2(whole)
    assert all(torch.equal(a, b) for a, b in zip(batches, cached(whole).stream, strict=True))
    assert torch.equal(Cache(str(whole)).piece(1, [1]), Cache(str(whole)).piece(1)[:, 1:])
    harvester(whole).verify()
    assert harvester(whole).build().key["format"] == 2
    shard = whole / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged"):
        list(cached(whole).stream)
    harvester(whole).build(rebuild=True)
    assert all(torch.equal(a, b) for a, b in zip(batches, cached(whole).stream, strict=True))


def test_an_unfinished_cache_of_format_2_is_continued(whole):
    as_format_2(whole)
    manifest = Cache(str(whole)).manifest
    manifest.complete, manifest.shards = False, manifest.shards[:1]
    del manifest.key["shard_tokens"]  # which decided less then
    manifest.write(store.Store(whole))
    harvester(whole).build()
    continued = Cache(str(whole))
    rows = torch.cat([continued.piece(i) for i in range(continued.n_pieces)])
    assert torch.equal(rows, streamed_rows()[:N])


def test_a_format_to_come_is_refused(whole):
    manifest = Cache(str(whole)).manifest
    manifest.key["format"] = 4
    manifest.write(store.Store(whole))
    for use in (lambda: cached(whole), lambda: harvester(whole).build(rebuild=True)):
        with pytest.raises(UserError, match="has cache format 4, expected 2 or 3: harvest into another cache_dir"):
            use()


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seq_len": 9}, "seq_len is 8 in the cache and 9 here"),
        ({"exclude_bos": False}, "data.exclude_bos is True in the cache and False here"),
        ({"exclude_first": 1}, "data.exclude_first is 0 in the cache and 1 here"),
        ({"lm": Follow(scale=1.1)}, r"does not compute \(they differ by 10.0%\)"),
    ],
)
def test_a_run_of_other_settings_is_refused(whole, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        cached(whole, **changes)


def test_a_run_of_another_model_is_refused(whole):
    lm = Follow()
    lm.bos_id = 1
    with pytest.raises(
        UserError, match=r"of lm.name=follow with other settings \(lm.bos_id is 0 in the cache and 1 here"
    ):
        cached(whole, lm)
    lm = Follow()
    lm.sites = ("a", "c")
    with pytest.raises(UserError, match=r"holds \[a,b\] of follow, not \[c\]: choose lm.sites among these"):
        cached(whole, lm)
    lm = Follow()
    lm.model.weight.data += 1
    with pytest.raises(UserError, match=r"lm\.weights is"):
        cached(whole, lm)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"n_documents": 91}, "data.n_documents is 90 in the cache and 91 here"),
        ({"seed": 1}, "data.first_rows"),
        ({"n_tokens": 601}, "n_tokens is 600 in the cache and 601 here"),
        ({"dtype": "bfloat16"}, "dtype is float32 in the cache and bfloat16 here"),
        ({"dtype": "int8"}, "dtype is float32 in the cache and int8 here"),
        ({"exclude_first": 3}, "data.exclude_first is 0 in the cache and 3 here"),
    ],
)
def test_a_harvest_of_other_settings_is_refused_and_leaves_the_cache(whole, changes, key):
    before = files(whole)
    if "seed" in changes:
        other = harvester(whole)
        other.files.data.text.documents = partial(UniqueWords, n_documents=90, seed=1)
        other.files.key |= data_key(other.files.data)
        key = r"data\.first_rows is .* data\.seed is None in the cache and 1 here"
    else:
        other = harvester(whole, **changes)
    with pytest.raises(UserError, match=key):
        other.build()
    assert files(whole) == before


def test_a_run_notices_that_its_cache_was_exchanged(whole, tmp_path):
    state = cached(whole).state_dict()
    harvester(tmp_path / "other", n_tokens=500).build()
    with pytest.raises(UserError, match="is not the cache that this run began with"):
        list(stream_from(cached(tmp_path / "other"), state))


def stream_from(data: CachedData, state):
    data.load_state_dict(state)
    return data.stream


def test_no_cache_and_an_unfinished_one_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no cache: make one with"):
        cached(tmp_path / "none")
    stopped(tmp_path, monkeypatch, after=2)
    with pytest.raises(UserError, match=r"is unfinished, with 1[0-9]{2} of 600 tokens"):
        cached(tmp_path)


# ---- faults


def stopped(folder: Path, monkeypatch, after: int, error: BaseException | None = None) -> None:
    """A harvest whose disk refuses every write after the first `after` files."""
    real, written = store.write_atomically, []

    def write(path: Path, content: bytes) -> None:
        if len(written) >= after + 2:  # held-out text and the empty manifest
            raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_atomically", write)
        with pytest.raises((UserError, KeyboardInterrupt)):
            harvester(folder).build()


@pytest.mark.parametrize("after", range(6))
def test_a_stopped_harvest_continues_to_the_same_files(whole, tmp_path, monkeypatch, after):
    stopped(tmp_path / "stopped", monkeypatch, after, KeyboardInterrupt())
    harvester(tmp_path / "stopped").build()
    assert files(tmp_path / "stopped") == files(whole)


def build_and_die_in_write(folder: str, n: int) -> None:
    """Killed by SIGKILL half-way through the n-th file."""
    real, written = os.fsync, []

    def fsync(fd: int) -> None:
        written.append(fd)
        if len(written) == n:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync
    harvester(folder).build()


@pytest.mark.process
@pytest.mark.parametrize("n", [3, 4, 7])
def test_a_harvest_killed_within_a_file_continues_to_the_same_files(whole, tmp_path, n):
    process = get_context("fork").Process(target=build_and_die_in_write, args=(str(tmp_path / "killed"), n))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(p.name.startswith(".") for p in (tmp_path / "killed").rglob("*"))
    harvester(tmp_path / "killed").build()
    assert files(tmp_path / "killed") == files(whole)


@pytest.mark.parametrize("where", ["activations.0", "end of activations.1", "tokens", "shape", "checksums", "header"])
def test_a_flipped_bit_is_found_named_and_mended(whole, where):
    before, shard = files(whole), whole / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    at = {name: tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"}
    at |= {"header": -1, "end of activations.1": header["activations.1"]["data_offsets"][1] - 1}
    content[start + at[where]] ^= 16
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged: harvest it again with rebuild=true"):
        list(cached(whole).stream)
    with pytest.raises(
        UserError, match=r"damaged or missing files \(shard-00001\.safetensors\): rewrite them with rebuild=true"
    ):
        harvester(whole).verify()
    harvester(whole).build(rebuild=True)
    assert files(whole) == before
    harvester(whole).verify()


def test_a_missing_and_a_cut_shard_are_found_and_mended(whole):
    before = files(whole)
    (whole / "shard-00000.safetensors").unlink()
    (whole / "shard-00002.safetensors").write_bytes(before["shard-00002.safetensors"][:-1])
    with pytest.raises(UserError, match=r"shard-00000.* is damaged"):
        cached(whole)
    with pytest.raises(
        UserError, match=r"damaged or missing files \(shard-00000\.safetensors, shard-00002\.safetensors\):"
    ):
        harvester(whole).verify()
    harvester(whole).build(rebuild=True)
    assert files(whole) == before


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b[:-1] + bytes([b[-1] ^ 1]), None])
def test_damaged_held_out_text_is_found_named_and_mended(whole, damage):
    before, file = files(whole), whole / "held_out.safetensors"
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"held_out.safetensors is damaged: harvest it again with rebuild=true"):
        cached(whole).held_out_rows(8)
    with pytest.raises(
        UserError, match=r"damaged or missing files \(held_out\.safetensors\): rewrite them with rebuild=true"
    ):
        harvester(whole).verify()
    harvester(whole).build(rebuild=True)
    assert files(whole) == before


def test_held_out_text_of_another_length_is_mended_too(whole):
    (whole / "held_out.safetensors").unlink()
    harvester(whole, n_eval_tokens=16).build(rebuild=True)
    harvester(whole).verify()
    assert len(Cache(str(whole)).held_out()) == 2


def test_text_that_changed_behind_its_first_rows_is_refused(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(4):
        (corpus / f"{i}.txt").write_text("1 2 3 4 " * 900)

    def of_files() -> CacheWriter:
        result = harvester(tmp_path / "cache")
        result.files.data.text.documents = partial(FileDocuments, [str(corpus / "*.txt")])
        result.files.key |= data_key(result.files.data)
        return result

    before = of_files().files.key
    (corpus / "2.txt").write_text("1 2 3 4 " * 899 + "1 2 3 5 ")
    after = of_files().files.key
    assert [key for key in before if before[key] != after[key]] == ["data.digest"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_manifest_is_named_and_mended(whole, share):
    before = files(whole)
    manifest = before["manifest.json"]
    (whole / "manifest.json").write_bytes(manifest[: int(share * len(manifest))])
    for use in (lambda: cached(whole), lambda: harvester(whole).build()):
        with pytest.raises(UserError, match=r"manifest.json is damaged .*rebuild=true"):
            use()
    harvester(whole).build(rebuild=True)
    assert files(whole) == before


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 24 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_in_one_sentence_and_can_continue(whole, small_disk):
    with pytest.raises(UserError, match=r"^The disk of .* is full: free some space, .* command again to continue\.$"):
        harvester(small_disk).build()
    assert not [p for p in small_disk.iterdir() if p.name.startswith(".shard")]
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    harvester(small_disk).build()
    assert files(small_disk) == files(whole)


@pytest.mark.parametrize("after", range(6))
def test_a_disk_that_is_full_at_any_file_can_continue(whole, tmp_path, monkeypatch, after):
    stopped(tmp_path / "full", monkeypatch, after)
    harvester(tmp_path / "full").build()
    assert files(tmp_path / "full") == files(whole)


def test_a_read_only_folder_is_named_and_a_whole_cache_in_it_is_used(whole, small_disk):
    for name, content in files(whole).items():
        subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
        (small_disk / name).write_bytes(content)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert harvester(small_disk).build().complete
    assert len(list(cached(small_disk).stream)) == 38
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): choose another cache_dir="):
        harvester(small_disk / "new").build()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another cache_dir="):
        harvester(tmp_path / "file" / "cache").build()
    with pytest.raises(UserError, match=r"cannot be opened .*give a folder, or a URL that fsspec knows"):
        harvester("nowhere://cache")
