"""The files of a cache: what they hold, written whole and checked where they are read.

    manifest.json             format, key (all that decides a number in the cache), shards in order
    shard-00000.safetensors   activations (n, s, d), tokens (r, t) of the text rows they come from, checksums (pieces)
    held_out.safetensors      tokens (r, t) of held-out text, so that evaluation needs neither documents nor network

Activations lie in the order of the text, without the excluded positions. A piece is PIECE rows of a shard (its last
one may be shorter): what is read, and checked, at a time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from sae_lab.activations.digests import as_bytes
from sae_lab.activations.source import Chunk
from sae_lab.cache.store import Store
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.screen import track

FORMAT = 2
PIECE = 128
MANIFEST, HELD_OUT_FILE = "manifest.json", "held_out.safetensors"
REBUILD = "harvest it again with rebuild=true"


class Shard(NamedTuple):
    """One file, and the place in the text from which it can be made again."""

    file: str
    rows: int
    text_rows: int
    begin: dict[str, Any]
    size: int
    checksum: str

    @property
    def pieces(self) -> int:
        return -(-self.rows // PIECE)


@dataclass
class Manifest:
    """What a cache holds; `held_out_whole`: the held-out text ended before as much was there as was asked for."""

    model: str
    key: dict[str, Any]
    held_out_whole: bool
    held_out_checksum: str
    complete: bool = False
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def write(self, store: Store) -> None:
        content = asdict(self) | {"shards": [shard._asdict() for shard in self.shards]}
        store.write(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def read(cls, store: Store) -> "Manifest | None":
        """The manifest of a folder, or None where there is none.

        Raises:
            UserError: it is damaged.
        """
        if not store.exists(MANIFEST):
            return None
        try:
            content = json.loads(store.read(MANIFEST))
            shards = [Shard(**shard) for shard in content.pop("shards")]
            return cls(**content, shards=shards)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{store.url}/{MANIFEST} is damaged ({type(e).__name__}): {REBUILD}.") from e


def refuse_other(store: Store, manifest: Manifest, here: dict[str, Any], remedy: str) -> None:
    """Raise a UserError that names the keys in which the cache differs from what is wanted."""
    there = manifest.key
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        shown = ", ".join(f"{key} is {there.get(key)} there and {here[key]} here" for key in differing[:4])
        raise UserError(f"{store.url} holds other activations, of lm.name={manifest.model} ({shown}): {remedy}")


def write_shard(store: Store, file: str, chunks: Sequence[Chunk], limit: int) -> Shard:
    """The first `limit` rows of consecutive chunks as one file."""
    rows = torch.cat([chunk.rows for chunk in chunks])[:limit]
    tokens = torch.cat([chunk.tokens for chunk in chunks if chunk.tokens is not None]).int()
    content = save({"activations": rows, "tokens": tokens, "checksums": piece_checksums(rows)})
    store.write(file, content)
    return Shard(file, len(rows), len(tokens), chunks[0].state, len(content), xxhash.xxh3_128_hexdigest(content))


def write_held_out(store: Store, tokens: Int[Tensor, "r t"]) -> str:
    """The file's checksum."""
    content = save({"tokens": tokens.int()})
    store.write(HELD_OUT_FILE, content)
    return xxhash.xxh3_128_hexdigest(content)


def read_held_out(store: Store, checksum: str) -> Int[Tensor, "r t"]:
    """Raises a UserError where the file is missing or damaged."""
    try:
        content = store.local_file(HELD_OUT_FILE).read_bytes()
    except OSError:
        content = b""
    if xxhash.xxh3_128_hexdigest(content) != checksum:
        raise UserError(f"{store.url}/{HELD_OUT_FILE} is damaged: {REBUILD}.")
    return load(content)["tokens"].long()


def find_damaged(store: Store, manifest: Manifest) -> list[str]:
    """The files that are missing or not as they were written, by every byte of them."""
    checksums = {shard.file: shard.checksum for shard in manifest.shards} | {HELD_OUT_FILE: manifest.held_out_checksum}
    return [
        file
        for file, checksum in track(list(checksums.items()), "checking the files")
        if not store.exists(file) or xxhash.xxh3_128_hexdigest(store.read(file)) != checksum
    ]


def piece_checksums(rows: Float[Tensor, "n s d"]) -> Int[Tensor, " p"]:
    sums = [xxhash.xxh3_64_intdigest(as_bytes(piece)) for piece in rows.split(PIECE)]
    return torch.from_numpy(np.array(sums, dtype=np.uint64).view(np.int64))


class MappedShard:
    """The tensors of a shard, mapped into memory: the operating system reads what is used, once for all processes."""

    def __init__(self, store: Store, shard: Shard):
        self.damaged = UserError(f"{store.url}/{shard.file} is damaged: {REBUILD}.")
        try:
            file = store.local_file(shard.file)
            if file.stat().st_size != shard.size:
                raise self.damaged
            with safe_open(file, "pt") as tensors:
                self.activations: Tensor = tensors.get_tensor("activations")
                self.tokens: Tensor = tensors.get_tensor("tokens")
                self.checksums = tensors.get_tensor("checksums").numpy().view(np.uint64)
        except (OSError, SafetensorError) as e:
            raise self.damaged from e

    def piece(self, i: int) -> Float[Tensor, "n s d"]:
        rows = self.activations[i * PIECE : (i + 1) * PIECE]
        if xxhash.xxh3_64_intdigest(as_bytes(rows)) != self.checksums[i]:
            raise self.damaged
        return rows
