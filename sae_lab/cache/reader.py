"""Read a cache as a stream, in passes over its pieces, each in a new random order."""

import json
import logging
import os
from bisect import bisect_right
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.finite import check_finite
from sae_lab.activations.pieces import PiecePasses
from sae_lab.activations.source import Chunk
from sae_lab.cache.pieces import PIECE
from sae_lab.cache.progress import shards_so_far
from sae_lab.cache.shards import Manifest, OpenShard, read_held_out
from sae_lab.cache.store import Store
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.errors import UserError

log = logging.getLogger(__name__)

N_THREADS = min(4, os.cpu_count() or 1)
"""Threads that read a chunk together. Their number changes no row."""
N_REQUESTS = 32
"""Threads where each piece is a request to a server, which takes tens of milliseconds."""
BAD_CACHE = "that cache was not written by sae_lab.harvest, so harvest into another cache_dir."


class Cache:
    """A complete cache, open for reading. Pieces are numbered consecutively over all shards.

    Args:
        path: folder or fsspec URL of the cache.
        copies: bytes that copies of remote shards may take on this machine. A larger cache is read piece by piece.

    Raises:
        UserError: there is no cache, or it is unfinished or of another format; a file is damaged (raised when it is
            read).
    """

    def __init__(self, path: str, copies: int = 0):
        self.store = Store(path)
        manifest = Manifest.read(self.store)
        if manifest is None:
            raise UserError(f"{path} holds no cache: make one with `python -m sae_lab.harvest cache_dir={path}`.")
        manifest.check_format(self.store)
        if not manifest.complete:
            n_rows = sum(shard.rows for shard in shards_so_far(self.store, manifest))
            raise UserError(
                f"{path} is unfinished, with {n_rows:,} of {manifest.key['n_tokens']:,} tokens: "
                "run the same `python -m sae_lab.harvest` command again to continue it."
            )
        self.manifest = manifest
        if not all(shard.index_checksum for shard in manifest.shards):
            log.warning("%s was harvested without digests: swapped files cannot be noticed.", path)
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(manifest.key).encode())
        self.copies = copies if sum(shard.size for shard in manifest.shards) <= copies else 0
        self._first = [0, *accumulate(shard.pieces for shard in manifest.shards)]
        self._open: dict[int, OpenShard] = {}

    @property
    def is_remote(self) -> bool:
        """Whether pieces are read from a server."""
        return self.store.folder is None and not self.copies

    @property
    def n_threads(self) -> int:
        return N_REQUESTS if self.is_remote else N_THREADS

    @property
    def n_pieces(self) -> int:
        return self._first[-1]

    def piece(self, i: int, sites: Sequence[int] | None = None) -> Float[Tensor, "n s d"]:
        """Return the rows of piece i at these sites (indices into `lm.sites` of the key), by default all."""
        shard, i = self.locate(i)
        return shard.piece(i, sites)

    def locate(self, i: int) -> tuple[OpenShard, int]:
        """Return the shard that holds piece i, and the number of the piece in it."""
        number = bisect_right(self._first, i) - 1
        return self.shard(number), i - self._first[number]

    def shard(self, number: int) -> OpenShard:
        if number not in self._open:
            key = self.manifest.key
            sizes = (len(key["lm.sites"]), self.copies)
            shard = OpenShard(self.store, self.manifest.shards[number], self.manifest.codec, *sizes)
            self._open[number] = shard
        return self._open[number]

    def pieces(
        self, numbers: Sequence[int], threads: Executor, sites: Sequence[int] | None = None
    ) -> Float[Tensor, "n s d"]:
        """Return the rows of several pieces, one after the other; each thread decodes a part of them.

        Checksums, zstd and torch do not hold the interpreter's lock. Rows that are only copied are read by this thread:
        one core copies and verifies 4 GB/s, and two pass each other's memory on.
        """
        run = threads.map if self.is_remote or self.manifest.codec.has_to_decode else map
        for _ in run(self.shard, sorted({bisect_right(self._first, i) - 1 for i in numbers})):
            pass  # opened at once, each of which asks a server
        located = [self.locate(i) for i in numbers]
        sites = located[0][0].sites if sites is None else sites
        ends = list(accumulate((shard.piece_rows(i) for shard, i in located), initial=0))
        rows = torch.empty(ends[-1], len(sites), located[0][0].d, dtype=self.manifest.codec.decoded)

        def read(part: slice) -> None:
            for (shard, i), out in list(zip(located, rows.tensor_split(ends[1:-1]), strict=True))[part]:
                shard.read(i, sites, out)

        size = -(-len(located) // self.n_threads)
        for _ in run(read, (slice(k, k + size) for k in range(0, len(located), size))):
            pass
        return rows

    def held_out(self) -> Int[Tensor, "r t"]:
        return read_held_out(self.store, self.manifest.held_out_checksum)


class CachedSource:
    """A Source that yields every row of a cache once per pass, in the order of PiecePasses.

    Rows are read when they are needed: by each of n ranks, those of every n-th chunk.

    Args:
        sites: the sites to read, as indices into `lm.sites` of the key, in the order of axis s; None: all. They change
            neither the order of the rows nor the state.
    """

    def __init__(
        self,
        cache: Cache,
        chunk_rows: int,
        seed: int,
        repeat: bool,
        device: torch.device,
        sites: Sequence[int] | None = None,
    ):
        self.cache, self.device = cache, device
        self.sites = range(len(cache.manifest.key["lm.sites"])) if sites is None else sites
        self.passes = PiecePasses(torch.arange(cache.n_pieces), chunk_rows // PIECE, seed, repeat, log_new_pass)

    def state_dict(self) -> dict[str, Any]:
        return {"cache": self.cache.identity} | self.passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["cache"] != self.cache.identity:
            raise UserError(
                f"{self.cache.store.url} is not the cache that this run began with: "
                "use that cache, or start over with resume=never."
            )
        self.passes.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        with ThreadPoolExecutor(self.cache.n_threads, "cache") as threads:
            yield from self._chunks(threads)

    def _chunks(self, threads: Executor) -> Generator[Chunk, None, None]:
        names = [self.cache.manifest.key["lm.sites"][i] for i in self.sites]
        for i, (state, pieces) in enumerate(self.passes):
            if i % world_size() == rank():
                in_order_of_disk = pieces.sort().values.tolist()
                rows = self.cache.pieces(in_order_of_disk, threads, self.sites)
                rows = check_finite(rows.to(self.device), names, BAD_CACHE)
            else:
                shape = (len(pieces) * PIECE, len(names), self.cache.shard(0).d)
                rows = torch.empty(shape, dtype=self.cache.manifest.codec.decoded, device="meta")
            yield Chunk({"cache": self.cache.identity} | state, rows, rank=i % world_size())


def log_new_pass(number: int) -> None:
    log.info("End of the cache: starting pass %d over it, in a new order.", number)
