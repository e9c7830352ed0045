"""Write a cache: store a language model's activations on disk, shard by shard."""

import logging
import shutil
import time
from contextlib import closing
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from sae_lab.activations.data import ActivationData
from sae_lab.activations.finite import check_finite
from sae_lab.activations.source import Chunk
from sae_lab.cache.claims import Claims
from sae_lab.cache.codec import CacheDtype, Codec, Compression, storage_errors
from sae_lab.cache.key import data_key, lm_key
from sae_lab.cache.progress import FOLDER, Progress, shards_so_far
from sae_lab.cache.ranges import Ranges
from sae_lab.cache.shards import (
    FORMAT,
    HELD_OUT_FILE,
    MANIFEST,
    Manifest,
    Shard,
    check_same_key,
    find_damaged,
    shard_name,
    write_held_out,
    write_shard,
)
from sae_lab.cache.store import Store
from sae_lab.cache.worker import POLL, Worker, gather
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.memory import check_memory_of
from sae_lab.runtime.screen import TokenProgress
from sae_lab.runtime.signals import deferred_signals, raise_if_stopped
from sae_lab.text.rows import NextRows

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
        shard_tokens: activations per shard, at most, rounded up to whole text rows. One shard is held in memory.
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
        self.data, self.store = data, Store(path)
        self.n_tokens, self.shard_tokens, self.lost_after = n_tokens, shard_tokens, lost_after
        lm = lm_key(data.lm)
        stored = lm["lm.dtype"] if dtype == "auto" else dtype
        size = {"n_tokens": n_tokens, "shard_tokens": shard_tokens, "dtype": stored, "compression": compression}
        self.key = {"format": FORMAT} | lm | data_key(data) | size
        self.codec = Codec.of(self.key)
        shard = min(shard_tokens, n_tokens) * len(data.lm.sites) * data.d_in * self.codec.decoded.itemsize
        check_memory_of(torch.device("cpu"), shard, "a shard in memory takes {size}: lower the tokens of a shard.")

    def build(self, rebuild: bool = False) -> Manifest:
        """Write the missing shards; with `rebuild`, first verify all shards and rewrite damaged ones.

        Raises:
            SafeStop: a signal arrived, and the shard that was then being filled is written.
        """
        if rebuild:
            with self.store.locked(), deferred_signals():
                self._mend()
        manifest = self._read()
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
        manifest = self._read()
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
                *(f"{sum(shard.rows for shard in shards):,}", f"{self.n_tokens:,}"),
            )

    def _read(self, start_over: bool = False) -> Manifest | None:
        """Return the cache's manifest; None if there is none, or if it is damaged and `start_over` is set."""
        try:
            manifest = Manifest.read(self.store)
        except UserError:
            if start_over:
                return None
            raise
        if manifest is not None:
            manifest.check_format(self.store)
            here = self.key | {"format": manifest.key["format"]}  # every shard tells its own format
            if "shard_tokens" not in manifest.key:  # of an earlier version, whose shards tell their text rows
                del here["shard_tokens"]
            check_same_key(self.store, manifest, here, "choose another cache_dir=...")
            self.data.positions.limits = manifest.norm_limits
        return manifest

    def _write_missing(self, claims: Claims) -> Manifest:
        """Write shards, beside other workers, until all are there; then list them in the manifest."""
        manifest = self._begin(claims)
        if manifest.complete:
            return manifest
        progress, rows = Progress(self.store.within(FOLDER), len(manifest.shards)), self.data.rows()
        begun = manifest.rows  # by an earlier version, which listed each shard when it was written
        if manifest.shards:
            last = manifest.shards[-1]
            rows.load_state_dict(last.begin)
            rows.skip(last.text_rows)
        _, bos, first, _ = self.data.positions.exclusions
        row_tokens = self.data.seq_len - max(first, bos)
        ranges = Ranges(self.n_tokens - begun, -(-self.shard_tokens // row_tokens), row_tokens)

        def write(i: int, chunks: list[Chunk]) -> Shard:
            return self.write_shard(shard_name(len(manifest.shards) + i), chunks)

        with TokenProgress("harvesting", self.n_tokens, begun) as bar, closing(rows):
            Worker(self.data, ranges, progress, claims, write, bar, begun).run(rows, self._is_complete)
        manifest = self._read() or manifest
        if not manifest.complete:
            manifest = self._complete(manifest, ranges.shards(progress.done))
        return manifest

    def _is_complete(self) -> bool:
        manifest = Manifest.read(self.store)
        return manifest is not None and manifest.complete

    def _begin(self, claims: Claims) -> Manifest:
        """Return the manifest; of several workers, one makes it, and the others wait."""
        while (manifest := self._read()) is None:
            raise_if_stopped()
            if claims.take(START):
                manifest = self._read() or self._start()
                claims.release(START)
                return manifest
            time.sleep(min(POLL, self.lost_after / 10))
        return manifest

    def _start(self) -> Manifest:
        """Log the size of the cache and its error, then write the held-out text and an empty manifest."""
        data = self.data
        bytes_per_token = len(data.lm.sites) * self.codec.bytes_per_row(data.d_in)
        log.info(
            "%s: %s tokens x %d sites x %d x %s = %.2f GB%s%s.",
            *(self.store.url, f"{self.n_tokens:,}", len(data.lm.sites), data.d_in, self.key["dtype"]),
            self.n_tokens * bytes_per_token / 1e9,
            " before compression" if self.codec.compression != "none" else "",
            self._free(),
        )
        errors = self._measure_errors()
        whole, checksum = self._write_held_out()
        manifest = Manifest(data.lm.name, self.key, whole, checksum, errors=errors, norm_limits=data.positions.limits)
        manifest.write(self.store)
        return manifest

    def _measure_errors(self) -> dict[str, dict[str, float]]:
        """Measure and log what the dtype costs, on held-out text; nothing if it holds all that the model's does."""
        lm_dtype, stored = self.data.lm.dtype, self.codec.stored
        if not self.codec.has_scales and torch.promote_types(stored, lm_dtype) == stored:
            return {}
        positions = self.data.positions
        rows = torch.cat([positions.activations(row) for row in positions.probe_text().split(1)])
        errors = storage_errors(self.codec, rows, self.data.lm.sites)
        for site, error in errors.items():
            log.info(
                "dtype=%s changes activations of %s by %.2g of their norm: fvu is %.2g before any SAE.",
                *(self.key["dtype"], site, error["relative"], error["fvu"]),
            )
        return errors

    def _write_held_out(self) -> tuple[bool, str]:
        """Write the held-out text; return whether that is all there is, and the file's checksum."""
        wanted = max(1, self.data.n_eval_tokens // self.data.seq_len)
        held_out = self.data.text.held_out(wanted)
        return len(held_out) < wanted, write_held_out(self.store, held_out)

    def _free(self) -> str:
        folder = self.store.folder
        return "" if folder is None else f" ({shutil.disk_usage(folder).free / 1e9:.1f} GB are free on this disk)"

    def _complete(self, manifest: Manifest, shards: list[Shard]) -> Manifest:
        """List the shards that were harvested in the manifest; raise a UserError if the text had no row."""
        manifest.shards += shards
        if manifest.rows == 0:
            raise UserError(f"the text is shorter than one row of seq_len={self.data.seq_len} tokens: give more text.")
        if manifest.rows < self.n_tokens:
            log.warning("The text ended after %s of %s tokens.", f"{manifest.rows:,}", f"{self.n_tokens:,}")
        manifest.complete = True
        manifest.write(self.store)
        return manifest

    def _remove_progress(self) -> None:
        """Remove what only an unfinished cache needs, also where another worker has just finished it."""
        self.store.within(FOLDER).remove_folder()
        self.store.remove_partial_files()

    def write_shard(self, file: str, chunks: list[Chunk], limit: int | None = None) -> Shard:
        chunks = [chunk._replace(rows=chunk.rows.to(self.codec.decoded)) for chunk in chunks]
        for chunk in chunks:  # finite in the language model's dtype; the cache's may hold less
            check_finite(chunk.rows, self.data.lm.sites, "give dtype=bfloat16.")
        shard = write_shard(self.store, file, chunks, limit, self.codec)
        if shard.rows == 0:
            raise UserError(
                f"data.exclude_... and data.max_norm leave out all {shard.text_rows * self.data.seq_len} tokens of "
                f"{file}: leave out fewer, or raise shard_tokens={self.shard_tokens}."
            )
        return shard

    def _mend(self) -> None:
        """Verify all files and write damaged or missing ones again. Without a readable manifest, start over."""
        manifest = self._read(start_over=True)
        if manifest is None:
            self.store.remove(MANIFEST)
            self.store.within(FOLDER).remove_folder()
            return
        bad = find_damaged(self.store, shards_so_far(self.store, manifest), manifest.held_out_checksum)
        for file in bad:
            log.warning("%s is damaged or missing: writing it again.", file)
        if HELD_OUT_FILE in bad:
            manifest.held_out_whole, manifest.held_out_checksum = self._write_held_out()
            manifest.write(self.store)
        for i, shard in enumerate(manifest.shards):
            raise_if_stopped()
            if shard.file in bad:
                manifest.shards[i] = self._rewrite(shard, "shard_tokens" in manifest.key)
                manifest.write(self.store)
        if not manifest.complete:
            progress = Progress(self.store.within(FOLDER), len(manifest.shards))
            progress.refresh()
            for i in [i for i, shard in progress.done.items() if shard.file in bad]:
                progress.remove(i)

    def _rewrite(self, shard: Shard, whole: bool) -> Shard:
        """Write a shard again from its text rows. `whole`: its file holds all that these give, even beyond n_tokens."""
        rows = self.data.rows()
        rows.load_state_dict(shard.begin)
        with closing(rows):
            chunks = gather(self.data, NextRows(rows, shard.text_rows), lambda n: None)
        written = self.write_shard(shard.file, chunks, None if whole else shard.rows)
        return written._replace(rows=shard.rows)
