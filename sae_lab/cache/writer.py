"""Write a cache: store a language model's activations on disk, shard by shard."""

import logging
import time
from contextlib import closing
from typing import Annotated

from annotated_types import Ge, Gt

from sae_lab.activations.data import ActivationData
from sae_lab.activations.source import Chunk
from sae_lab.cache.claims import Claims
from sae_lab.cache.codec import CacheDtype, Compression
from sae_lab.cache.files import CacheFiles
from sae_lab.cache.mending import mend
from sae_lab.cache.progress import FOLDER, Progress, shards_so_far
from sae_lab.cache.ranges import Ranges
from sae_lab.cache.shards import Manifest, Shard, find_damaged, shard_name
from sae_lab.cache.store import Store
from sae_lab.cache.worker import POLL, Worker
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.screen import TokenProgress
from sae_lab.runtime.signals import deferred_signals, raise_if_stopped

log = logging.getLogger(__name__)

START = "start"
"""The claim of the worker that writes the held-out text and the first manifest."""


class CacheWriter:
    """Writes a cache, shard by shard, beside any number of other writers of the same cache.

    If it is stopped, it finishes the current shard; the same call continues. Whoever writes a shard, its file is the
    same: it holds a range of text rows that depends on the settings only (see ranges.Ranges).

    Args:
        data: the language model, the text and the excluded positions; `data.n_eval_tokens` of held-out text are stored
            too.
        path: a folder, or any fsspec URL.
        n_tokens: exact number of activations to store; fewer if the text ends first with `data.repeat=false`.
        shard_tokens: activations per shard, at most, rounded up to whole text rows. One is written while the next is
            computed. Both are in memory in the language model's dtype, the one that is written also three times in
            the dtype of the cache.
        dtype: dtype of the cache: float32, float16, bfloat16, int8, float8_e4m3 (see codec.Codec), or auto for the
            language model's.
        compression: none, or zstd, which loses nothing.
        lost_after: seconds without a sign of life after which another writer takes over the shard of this one.

    Raises:
        UserError: the folder holds another cache or cannot be written; there is no text; activations overflow `dtype`.
    """

    @check_arguments
    def __init__(
        self,
        data: ActivationData,
        path: str,
        n_tokens: Annotated[int, Ge(1)],
        shard_tokens: Annotated[int, Ge(1)],
        dtype: CacheDtype = "auto",
        compression: Compression = "none",
        lost_after: Annotated[float, Gt(0)] = 60.0,
    ):
        self.files = CacheFiles(data, Store(path), n_tokens, shard_tokens, dtype, compression)
        self.store, self.lost_after = self.files.store, lost_after

    def build(self, rebuild: bool = False) -> Manifest:
        """Write the missing shards; with `rebuild`, first verify all shards and rewrite damaged ones.

        Raises:
            SafeStop: a signal arrived, and the shard that was then being filled is written.
        """
        if rebuild:
            with self.store.locked(), deferred_signals():
                mend(self.files)
        manifest = self.files.read_manifest()
        if manifest is None or not manifest.complete:
            with deferred_signals(), Claims(self.store.within(FOLDER), self.lost_after) as claims:
                manifest = self._write_missing(claims)
        self._remove_progress()
        log.info("%s is complete: %s tokens in %d shards.", self.store.url, f"{manifest.rows:,}", len(manifest.shards))
        return manifest

    def verify(self) -> None:
        """Check every byte of every file of the cache.

        Raises:
            UserError: files are damaged or missing; the message names them.
        """
        manifest = self.files.read_manifest()
        shards = shards_so_far(self.store, manifest) if manifest else []
        bad = find_damaged(self.store, shards, manifest.held_out_checksum) if manifest else []
        if bad:
            raise UserError(
                f"{self.store.url} has damaged or missing files ({', '.join(bad)}): rewrite them with rebuild=true."
            )
        log.info("%s: all of its %d shards are intact.", self.store.url, len(shards))
        if manifest is None or not manifest.complete:
            log.warning(
                "The cache is unfinished, with %s of %s tokens: run the command without verify=true to continue it.",
                *(f"{sum(shard.rows for shard in shards):,}", f"{self.files.n_tokens:,}"),
            )

    def _write_missing(self, claims: Claims) -> Manifest:
        """Write shards, beside other workers, until all are there; then list them in the manifest."""
        manifest = self._begin(claims)
        if manifest.complete:
            return manifest
        files, data = self.files, self.files.data
        progress, rows = Progress(self.store.within(FOLDER), len(manifest.shards)), data.rows()
        begun = manifest.rows  # by an earlier version, which listed each shard when it was written
        if manifest.shards:
            last = manifest.shards[-1]
            rows.load_state_dict(last.begin)
            rows.skip(last.text_rows)
        _, bos, first, _ = data.positions.exclusions
        row_tokens = data.seq_len - max(first, bos)
        ranges = Ranges(files.n_tokens - begun, -(-files.shard_tokens // row_tokens), row_tokens)

        def write(i: int, chunks: list[Chunk]) -> Shard:
            return files.write_shard(shard_name(len(manifest.shards) + i), chunks)

        with TokenProgress("harvesting", files.n_tokens, begun) as bar, closing(rows):
            Worker(data, ranges, progress, claims, write, self._is_complete, bar, begun).run(rows)
        manifest = files.read_manifest() or manifest
        if not manifest.complete:
            files.complete(manifest, ranges.shards(progress.done))
        return manifest

    def _is_complete(self) -> bool:
        manifest = Manifest.read(self.store)
        return manifest is not None and manifest.complete

    def _begin(self, claims: Claims) -> Manifest:
        """Return the manifest; of several workers, one makes it, and the others wait."""
        while (manifest := self.files.read_manifest()) is None:
            raise_if_stopped()
            if claims.take(START):
                manifest = self.files.read_manifest() or self.files.start()
                claims.release(START)
                return manifest
            time.sleep(min(POLL, self.lost_after / 10))
        return manifest

    def _remove_progress(self) -> None:
        """Remove what only an unfinished cache needs, also where another worker has just finished it."""
        self.store.within(FOLDER).remove_folder()
        self.store.remove_partial_files()
