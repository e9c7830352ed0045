"""How rows are stored: values, errors, and what is refused of frames that somebody else wrote."""

from functools import partial

import pytest
import torch
import zstandard
from fakes import SETTINGS, Follow, UniqueWords

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.source import Chunk
from sae_lab.cache.codec import Codec, as_half, compress, decompress, storage_errors
from sae_lab.cache.data import CachedData
from sae_lab.cache.pieces import PIECE, SitePieces, checksum_of_index, pack
from sae_lab.cache.reader import Cache
from sae_lab.cache.shards import OpenShard, write_shard
from sae_lab.cache.store import Store
from sae_lab.cache.writer import CacheWriter
from sae_lab.runtime.errors import UserError

CODECS = [Codec(dtype, torch.float32, how) for dtype in ("float32", "int8", "float8_e4m3") for how in ("none", "zstd")]
TOKENS = torch.zeros(3, 8, dtype=torch.long)


def rows(n: int = 300, s: int = 3, d: int = 16) -> torch.Tensor:
    x = torch.randn(n, s, d, generator=torch.Generator().manual_seed(0))
    x[7] *= 4000  # beyond the range of float8_e4m3
    x[8] = 0
    x[9] = 1e-40
    return x


def test_int8_rounds_to_127_steps_of_the_rows_largest_activation():
    x = torch.tensor([[1.27, -0.634, 0.015, 0.0], [-12.7, 6.36, 0.04, 0.06], [0.0, 0.0, 0.0, 0.0]])
    q, scales = Codec("int8", torch.float32).quantize(x)
    assert q.tolist() == [[127, -63, 2, 0], [-127, 64, 0, 1], [0, 0, 0, 0]]
    assert torch.allclose(scales[:2], torch.tensor([0.01, 0.1]))
    assert torch.allclose(
        Codec("int8", torch.float32).round_trip(x)[:2], torch.tensor([[1.27, -0.63, 0.02, 0], [-12.7, 6.4, 0, 0.1]])
    )


def test_float8_is_read_as_torch_reads_it():
    q = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    q = q[~q.float().isnan()]
    assert torch.equal(as_half(q).float() * 256, q.float())
    x = rows()[:, 0]
    assert (
        (Codec("float8_e4m3", torch.float32).round_trip(x) - x).abs() <= x.abs() / 16 + x.abs().amax() / 2**18
    ).all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_any_sites_of_a_shard_are_the_columns_of_all(tmp_path, codec):
    x, store = rows(), Store(tmp_path)
    shard = write_shard(store, "shard-00000.safetensors", [Chunk({}, x, TOKENS)], 290, codec)
    mapped = OpenShard(store, shard, codec, 3)
    expected = torch.stack([codec.round_trip(site) for site in x.unbind(dim=1)], dim=1)[:290]
    for i, whole in enumerate(expected.split(PIECE)):
        assert torch.equal(mapped.piece(i), whole)
        for sites in ([1], [2, 0], [0, 1, 2]):
            assert torch.equal(mapped.piece(i, sites), whole[:, sites])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_flipped_bit_spoils_its_piece_of_its_site_and_no_other(codec):
    tensors = pack(rows().unbind(dim=1), TOKENS, codec)
    name = "scales.1" if codec.has_scales and codec.compression == "none" else "activations.1"
    flat = tensors[name].view(-1).view(torch.uint8)
    flat[len(flat) // 2] ^= 4  # in the second of three pieces
    pieces = SitePieces(tensors, codec)
    out = torch.empty(PIECE, 2, 16)
    for i, sites in ((0, [0, 1]), (1, [0, 2])):
        pieces.read(i, sites, out)
    with pytest.raises(ValueError, match="checksum"):
        pieces.read(1, [0, 1], out)


def test_the_index_covers_everything_but_the_rows_and_their_scales():
    tensors = pack(rows().unbind(dim=1), TOKENS, Codec("int8", torch.float32, "zstd"))
    before = checksum_of_index(tensors)
    for name in ("tokens", "shape", "offsets.1", "checksums"):
        changed = tensors[name].clone()
        changed.view(-1)[0] += 1
        assert checksum_of_index(tensors | {name: changed}) != before
    assert checksum_of_index(tensors | {"scales.0": tensors["scales.0"][:-1]}) != before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offsets.0", lambda t: t.flip(0)),
        ("offsets.0", lambda t: t + 1),
        ("offsets.0", lambda t: t - 10**15),
        ("offsets.0", lambda t: t[:-1]),
        ("activations.0", lambda t: t[:-1]),
        ("scales.0", lambda t: t.double()),
        ("checksums", lambda t: t[:, :1]),
        ("shape", lambda t: t[:2]),
        ("shape", lambda t: t * 2),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(name, change):
    codec = Codec("int8", torch.float32, "zstd")
    tensors = pack(rows().unbind(dim=1), TOKENS, codec)
    with pytest.raises((ValueError, KeyError)):
        SitePieces(tensors | {name: change(tensors[name])}, codec)


def test_a_frame_of_another_size_is_refused_before_memory_is_taken(monkeypatch):
    like = torch.empty(128, 16, dtype=torch.int8, device="meta")
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    assert len(bomb) < 10_000
    whole = compress(torch.zeros(128, 16, dtype=torch.int8))
    assert torch.equal(decompress(memoryview(whole), like), torch.zeros(128, 16, dtype=torch.int8))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(128 * 16))
    for frame in (bomb, unsized, b"", b"nothing", whole[:-1], whole + whole):
        with pytest.raises(ValueError, match="frame"):
            decompress(memoryview(frame), like)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", None)  # what would take the memory
    with pytest.raises(ValueError, match="another size"):
        decompress(memoryview(bomb), like)


def test_a_shard_that_declares_more_than_the_memory_is_refused(tmp_path):
    codec, store = Codec("int8", torch.float32, "zstd"), Store(tmp_path)
    shard = write_shard(store, "shard-00000.safetensors", [Chunk({}, rows(), TOKENS)], 300, codec)
    file = tmp_path / shard.file
    content = file.read_bytes()
    declared = torch.tensor([300, 3, 16]).numpy().tobytes()
    file.write_bytes(content.replace(declared, torch.tensor([300, 3, 2**40]).numpy().tobytes()))
    assert file.read_bytes() != content
    with pytest.raises(UserError, match="declares"):
        OpenShard(store, shard._replace(index_checksum=""), codec, 3)


def test_errors_are_those_of_the_formula():
    x = torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]])
    half = Codec("int8", torch.float32)
    q = half.round_trip(x[:, 0])
    error = (x[:, 0] - q).double().square().sum().item()
    found = storage_errors(half, x, ["a"])["a"]
    assert found["fvu"] == pytest.approx(error / 2)
    assert found["relative"] == pytest.approx((error / 12) ** 0.5)
    assert storage_errors(Codec("float32", torch.float32), x * 0, ["a"]) == {"a": {"relative": 0.0, "fvu": 0.0}}


def text() -> ActivationData:
    return from_documents(Follow(), partial(UniqueWords, n_documents=90), order="shuffled", **SETTINGS)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3"])
def test_harvest_says_and_records_what_a_dtype_costs(tmp_path, caplog, dtype):
    caplog.set_level("INFO")
    manifest = CacheWriter(text(), str(tmp_path), 300, 100, dtype, "zstd").build()
    assert set(manifest.errors) == {"a", "b"}
    assert 0 < manifest.errors["a"]["fvu"] < 0.01
    assert f"dtype={dtype} changes activations of b by" in caplog.text
    assert "GB before compression" in caplog.text
    data = CachedData(Follow(), str(tmp_path), **SETTINGS)
    assert next(data.stream).dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    plain = tmp_path / "plain"
    assert CacheWriter(text(), str(plain), 300, 100, dtype).build().errors == manifest.errors
    a, b = Cache(str(tmp_path)), Cache(str(plain))
    assert all(torch.equal(a.piece(i), b.piece(i)) for i in range(a.n_pieces))
