"""The files of a cache. They are written atomically and verified when they are read.

    manifest.json             format, key (every setting that determines the activations), list of shards in order
    shard-00000.safetensors   activations, tokens of their text rows, checksums (see pieces.py)
    held_out.safetensors      tokens (r, t) of held-out text, so that evaluation needs neither documents nor network

Activations are in the order of the text, without the excluded positions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from sae_lab.activations.source import Chunk
from sae_lab.cache.codec import Codec
from sae_lab.cache.pieces import PIECE, SitePieces, WholePieces, checksum_of_index, pack
from sae_lab.cache.remote import local_copy, open_remote
from sae_lab.cache.store import Store
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_json, parse_json
from sae_lab.runtime.memory import check_memory
from sae_lab.runtime.screen import track

FORMAT = 3
READABLE = (2, 3)
"""Formats that are read. A cache of format 2 is continued and mended with shards of format 3, which it may then mix."""
ASSUMED: dict[str, Any] = {"compression": "none", "data.exclude_tokens": [], "data.max_norm": None}
"""What a cache has whose key lacks a setting, because it was harvested before there was that setting."""
MANIFEST, HELD_OUT_FILE = "manifest.json", "held_out.safetensors"
REBUILD = "harvest it again with rebuild=true"


class Shard(NamedTuple):
    """One shard file, with the position in the text (`begin`) from which it can be rebuilt.

    Of the last shard, the file may hold more rows: a cache has n_tokens, and a file whole text rows.
    """

    file: str
    rows: int
    text_rows: int
    begin: dict[str, Any]
    size: int
    checksum: str
    index_checksum: str = ""
    """Checksum of tokens and of the checksums of pieces: it binds the file to this place. Empty in older caches."""

    @property
    def pieces(self) -> int:
        return -(-self.rows // PIECE)


@dataclass
class Manifest:
    """The content of manifest.json.

    `held_out_whole` is true if the cache holds all of the held-out text, because there was less than requested.
    `errors` is what the dtype costs, by site (see codec.storage_errors); empty if nothing.
    `norm_limits` are those of Positions, with which the rows were left out; empty without data.max_norm.
    """

    model: str
    key: dict[str, Any]
    held_out_whole: bool
    held_out_checksum: str
    complete: bool = False
    shards: list[Shard] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    norm_limits: dict[str, float] = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        return Codec.of(self.key)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def write(self, store: Store) -> None:
        content = asdict(self) | {"shards": [shard._asdict() for shard in self.shards]}
        content["digest"] = digest_of_json(content)
        store.write(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def check_types(self, sealed: bool) -> None:
        """Raise a ValueError if a value has a type or a size that no cache has, or if the digest was taken out."""
        sizes = [size for shard in self.shards for size in (shard.rows, shard.text_rows + 1, shard.size)]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("sizes")
        if not (isinstance(self.key, dict) and isinstance(self.key.get("lm.sites"), list)):
            raise ValueError("key")
        limits = self.norm_limits.values()
        if not all(isinstance(limit, float) and 0 <= limit < float("inf") for limit in limits):
            raise ValueError("limits")
        if self.key.get("data.max_norm") is not None and set(self.norm_limits) != set(self.key["lm.sites"]):
            raise ValueError("no limits")
        if type(self.complete) is not bool or (self.complete and not self.shards):
            raise ValueError("no rows")
        if not sealed and any(shard.index_checksum for shard in self.shards):
            raise ValueError("no digest")
        if self.key.get("format") in READABLE:
            self.codec  # noqa: B018  raises if there is no such codec

    def check_format(self, store: Store) -> None:
        """Raise a UserError if this version does not read the cache's format."""
        if self.key.get("format") not in READABLE:
            formats = " or ".join(map(str, READABLE))
            raise UserError(
                f"{store.url} has cache format {self.key.get('format')}, expected {formats}: "
                "harvest into another cache_dir."
            )

    @classmethod
    def read(cls, store: Store) -> "Manifest | None":
        """Read the manifest of a folder; None if it has none.

        Raises:
            UserError: the manifest is damaged.
        """
        if not store.exists(MANIFEST):
            return None
        try:
            content = parse_json(store.read(MANIFEST))
            sealed = "digest" in content
            if content.pop("digest", None) not in (digest_of_json(content), None):
                raise ValueError("its digest differs")
            shards = [Shard(**shard) for shard in content.pop("shards")]
            if [shard.file for shard in shards] != [shard_name(i) for i in range(len(shards))]:
                raise ValueError("files of other names")
            manifest = cls(**content, shards=shards)
            manifest.check_types(sealed)
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{store.url}/{MANIFEST} is damaged ({type(e).__name__}): {REBUILD}.") from e


def check_same_key(store: Store, manifest: Manifest, here: dict[str, Any], remedy: str) -> None:
    """Raise a UserError if the cache's key differs from `here`, naming the settings that differ.

    `remedy` ends the message.
    """
    there = ASSUMED | manifest.key
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        shown = ", ".join(f"{key} is {there.get(key)} in the cache and {here[key]} here" for key in differing[:4])
        raise UserError(
            f"{store.url} holds activations of lm.name={manifest.model} with other settings ({shown}): {remedy}"
        )


def write_shard(store: Store, file: str, chunks: Sequence[Chunk], limit: int | None, codec: Codec) -> Shard:
    """Write the first `limit` rows of consecutive chunks to one file; None: all."""
    n_sites = chunks[0].rows.shape[1]
    sites = (rows_of_site(chunks, j, codec.decoded)[:limit] for j in range(n_sites))
    tokens = torch.cat([chunk.tokens for chunk in chunks if chunk.tokens is not None])
    tensors = pack(sites, tokens, codec)
    content = save(tensors)
    store.write(file, content)
    whole, index = xxhash.xxh3_128_hexdigest(content), checksum_of_index(tensors)
    return Shard(file, int(tensors["shape"][0]), len(tokens), chunks[0].state, len(content), whole, index)


def rows_of_site(chunks: Sequence[Chunk], j: int, dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """Return the rows of the j-th site of all chunks, converted as they are joined."""
    return torch.cat([chunk.rows[:, j] for chunk in chunks], out=torch.empty(0, dtype=dtype))


def shard_name(i: int) -> str:
    """Return the file name of the i-th shard. A manifest that names another file is not read."""
    return f"shard-{i:05d}.safetensors"


def write_held_out(store: Store, tokens: Int[Tensor, "r t"]) -> str:
    """Write the held-out tokens and return the file's checksum."""
    content = save({"tokens": tokens.int()})
    store.write(HELD_OUT_FILE, content)
    return xxhash.xxh3_128_hexdigest(content)


def read_held_out(store: Store, checksum: str) -> Int[Tensor, "r t"]:
    """Read the held-out tokens; raise a UserError if the file is missing or damaged."""
    try:
        content = store.read(HELD_OUT_FILE)
    except OSError:
        content = b""
    if xxhash.xxh3_128_hexdigest(content) != checksum:
        raise UserError(f"{store.url}/{HELD_OUT_FILE} is damaged: {REBUILD}.")
    return load(content)["tokens"].long()


def find_damaged(store: Store, shards: Sequence[Shard], held_out_checksum: str) -> list[str]:
    """Return the files that are missing or differ from what was written; reads every byte."""
    checksums = {shard.file: shard.checksum for shard in shards} | {HELD_OUT_FILE: held_out_checksum}
    return [
        file
        for file, checksum in track(list(checksums.items()), "checking the files")
        if not store.exists(file) or xxhash.xxh3_128_hexdigest(store.read(file)) != checksum
    ]


def open_tensors(store: Store, shard: Shard, copies: int) -> dict[str, Tensor]:
    """Return the tensors of a shard, by name; raise one of several errors if it is damaged."""
    if store.folder is None and not copies:
        return open_remote(store, shard.file)
    file = Path(store.path(shard.file))
    if store.folder is None:
        file = local_copy(store, shard.file, shard.size, shard.checksum, copies)
    if file.stat().st_size != shard.size:
        raise ValueError("size")
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


class OpenShard:
    """The tensors of a shard: memory-mapped, or behind a URL. Only rows that are used are read.

    Args:
        n_sites: sites of the cache.
        copies: bytes that copies of remote shards may take on this machine, in all; 0: they are not copied.
    """

    def __init__(self, store: Store, shard: Shard, codec: Codec, n_sites: int, copies: int = 0):
        self.damaged = UserError(f"{store.url}/{shard.file} is damaged: {REBUILD}.")
        self.codec = codec
        try:
            found = open_tensors(store, shard, copies)
            if shard.index_checksum not in ("", checksum_of_index(found)):
                raise self.damaged
            self.tokens: Tensor = found["tokens"]
            self.pieces = (WholePieces if "activations" in found else SitePieces)(found, codec)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            raise self.damaged from e
        n, s, d = self.pieces.shape
        if n < shard.rows or s != n_sites:
            raise self.damaged
        self.n, self.n_stored, self.d, self.sites = shard.rows, n, d, range(s)
        check_memory(Path(shard.file), min(n, PIECE) * s * d * 4)  # a compressed piece may be larger than its file

    def piece_rows(self, i: int) -> int:
        return min(PIECE, self.n - i * PIECE)

    def read(self, i: int, sites: Sequence[int], out: Float[Tensor, "n s d"]) -> None:
        """Write the rows of piece i at these sites into `out`; raise a UserError if their checksum is wrong."""
        if tuple(out.shape) != (self.piece_rows(i), len(sites), self.d):  # a shard of another width
            raise self.damaged
        stored = min(PIECE, self.n_stored - i * PIECE)
        whole = out if stored == len(out) else torch.empty(stored, len(sites), self.d, dtype=out.dtype)
        try:
            self.pieces.read(i, sites, whole)
            if whole is not out:
                out.copy_(whole[: len(out)])
        except ValueError as e:
            raise self.damaged from e

    def piece(self, i: int, sites: Sequence[int] | None = None) -> Float[Tensor, "n s d"]:
        """Return the rows of piece i at these sites, by default all; raise a UserError if their checksum is wrong."""
        sites = self.sites if sites is None else sites
        out = torch.empty(self.piece_rows(i), len(sites), self.d, dtype=self.codec.decoded)
        self.read(i, sites, out)
        return out
