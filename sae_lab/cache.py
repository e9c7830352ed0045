"""Activations on disk: shards of rows, a manifest that says what they are, and a shuffled way through them.

    manifest.json             format, key (all that decides a number in the cache), shards in order
    shard-00000.safetensors   activations (n, s, d), tokens (r, t) of the text rows they come from, checksums (pieces)
    held_out.safetensors      tokens (r, t) of held-out text, so that evaluation needs neither documents nor network

Activations lie in the order of the text, without the excluded positions. A piece is PIECE rows of a shard (its last
one may be shorter): what is read, and checked, at a time.
"""

import json
import logging
from bisect import bisect_right
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from sae_lab.buffer import Chunk
from sae_lab.errors import UserError
from sae_lab.lm.base import LanguageModel
from sae_lab.store import Store

log = logging.getLogger(__name__)

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


def lm_key(lm: LanguageModel) -> dict[str, Any]:
    """What of a language model decides its activations, wherever it was loaded from."""
    return {
        "format": FORMAT,
        "lm.backend": type(lm).__name__,
        "lm.sites": list(lm.sites),
        "lm.dtype": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "lm.bos_id": lm.bos_id,
        "lm.tokenizer": tokenizer_digest(lm.tokenizer),
        "lm.weights": weights_digest(lm.model),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """Of the parameters and buffers as loaded, so of revision and folding too (2 GB of them take a second)."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    rust = getattr(tokenizer, "backend_tokenizer", None)
    text = rust.to_str() if rust is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_128_hexdigest(text.encode())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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


class Cache:
    """A finished cache, open for reading. Pieces are numbered through all shards.

    Raises:
        UserError: no cache, an unfinished one, one of another format, a damaged file (whenever it is met).
    """

    def __init__(self, path: str):
        self.store = Store(path)
        manifest = Manifest.read(self.store)
        if manifest is None:
            raise UserError(f"{path} holds no cache: make one with `python -m sae_lab.harvest cache_dir={path}`.")
        if manifest.key.get("format") != FORMAT:
            raise UserError(f"{path} has format {manifest.key.get('format')}, and this is {FORMAT}: harvest it again.")
        if not manifest.complete:
            raise UserError(
                f"{path} is unfinished, with {manifest.rows:,} of {manifest.key['n_tokens']:,} tokens: "
                "the command that harvested it continues."
            )
        self.manifest = manifest
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(manifest.key).encode())
        self._first = [0, *accumulate(shard.pieces for shard in manifest.shards)]
        self._mapped: dict[int, MappedShard] = {}

    @property
    def n_pieces(self) -> int:
        return self._first[-1]

    def piece(self, i: int) -> Float[Tensor, "n s d"]:
        number = bisect_right(self._first, i) - 1
        return self.shard(number).piece(i - self._first[number])

    def shard(self, number: int) -> MappedShard:
        if number not in self._mapped:
            self._mapped[number] = MappedShard(self.store, self.manifest.shards[number])
        return self._mapped[number]

    def held_out(self) -> Int[Tensor, "r t"]:
        try:
            content = self.store.local_file(HELD_OUT_FILE).read_bytes()
        except OSError:
            content = b""
        if xxhash.xxh3_128_hexdigest(content) != self.manifest.held_out_checksum:
            raise UserError(f"{self.store.url}/{HELD_OUT_FILE} is damaged: {REBUILD}.")
        return load(content)["tokens"].long()


class CachedRows:
    """All rows of a cache, pass after pass: a `buffer.Source`.

    Pass number n takes the pieces in an order drawn from (seed, n), so each block of a stream holds text from
    everywhere; every row comes once a pass. The order is 8 bytes a piece; rows are read when they are needed.
    """

    def __init__(self, cache: Cache, chunk_rows: int, seed: int, repeat: bool, device: torch.device):
        self.cache, self.seed, self.repeat, self.device = cache, seed, repeat, device
        self.pieces_at_once = max(1, chunk_rows // PIECE)
        self.epoch = self.given = 0

    def state_dict(self) -> dict[str, Any]:
        return {"cache": self.cache.identity, "epoch": self.epoch, "piece": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["cache"] != self.cache.identity:
            raise UserError(
                f"{self.cache.store.url} is not the cache that this run began with: "
                "put that one back, or type resume=never to start again."
            )
        self.epoch, self.given = state["epoch"], state["piece"]

    def __iter__(self) -> Generator[Chunk, None, None]:
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.cache.n_pieces, generator=generator)
            while self.given < len(order):
                state = self.state_dict()
                pieces = order[self.given : self.given + self.pieces_at_once].sort().values  # as they lie on the disk
                self.given += len(pieces)
                rows = torch.cat([self.cache.piece(i) for i in pieces.tolist()])
                yield Chunk(state, rows.to(self.device))
            if not self.repeat:
                return
            self.epoch, self.given = self.epoch + 1, 0
            log.info("All of the cache was read: it starts over in a new order (pass %d).", self.epoch + 1)
