"""Write a cache: store a language model's activations on disk, shard by shard."""

import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from annotated_types import Ge

from sae_lab.activations.data import ActivationData
from sae_lab.activations.finite import check_finite
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Chunk, Source
from sae_lab.cache.codec import CacheDtype, Codec, Compression, storage_errors
from sae_lab.cache.key import data_key, lm_key
from sae_lab.cache.shards import (
    FORMAT,
    HELD_OUT_FILE,
    Manifest,
    Shard,
    check_same_key,
    find_damaged,
    shard_name,
    write_held_out,
    write_shard,
)
from sae_lab.cache.store import Store
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.memory import check_memory_of
from sae_lab.runtime.screen import TokenProgress
from sae_lab.runtime.signals import deferred_signals, raise_if_stopped

log = logging.getLogger(__name__)


class CacheWriter:
    """Writes a cache, shard by shard. If it is stopped, it finishes the current shard, and continues after it.

    Args:
        data: the language model, the text and the excluded positions; `data.n_eval_tokens` of held-out text are stored
            too.
        path: a folder, or any fsspec URL.
        n_tokens: exact number of activations to store; fewer if the text ends first with `data.repeat=false`.
        shard_tokens: activations per shard, rounded up to whole forward passes of the language model. One shard is
            held in memory.
        dtype: dtype of the cache: float32, float16, bfloat16, int8, float8_e4m3 (see codec.Codec), or auto for the
            language model's.
        compression: none, or zstd, which loses nothing.

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
    ):
        self.data, self.store = data, Store(path)
        self.n_tokens, self.shard_tokens = n_tokens, shard_tokens
        lm = lm_key(data.lm)
        stored = lm["lm.dtype"] if dtype == "auto" else dtype
        size = {"n_tokens": n_tokens, "dtype": stored, "compression": compression}
        self.key = {"format": FORMAT} | lm | data_key(data) | size
        self.codec = Codec.of(self.key)
        shard = min(shard_tokens, n_tokens) * len(data.lm.sites) * data.d_in * self.codec.decoded.itemsize
        check_memory_of(torch.device("cpu"), shard, "a shard in memory takes {size}: lower the tokens of a shard.")

    def build(self, rebuild: bool = False) -> Manifest:
        """Write the missing shards; with `rebuild`, first verify all shards and rewrite damaged ones.

        Raises:
            SafeStop: a signal arrived, and the shard that was then being filled is written.
        """
        manifest = self._read(start_over=rebuild)
        if manifest is None or rebuild or not manifest.complete:
            with self.store.locked():
                self.store.remove_partial_files()
                manifest = self._read(start_over=rebuild) or self._start()
                with deferred_signals():
                    if rebuild:
                        self._rewrite_damaged(manifest)
                    if not manifest.complete:
                        self._write_missing(manifest)
        log.info("%s is complete: %s tokens in %d shards.", self.store.url, f"{manifest.rows:,}", len(manifest.shards))
        return manifest

    def verify(self) -> None:
        """Check every byte of every file of the cache.

        Raises:
            UserError: files are damaged or missing; the message names them.
        """
        manifest = self._read()
        bad = find_damaged(self.store, manifest) if manifest else []
        if bad:
            raise UserError(
                f"{self.store.url} has damaged or missing files ({', '.join(bad)}): rewrite them with rebuild=true."
            )
        log.info("%s: all of its %d shards are intact.", self.store.url, len(manifest.shards) if manifest else 0)
        if manifest is None or not manifest.complete:
            log.warning(
                "The cache is unfinished, with %s of %s tokens: run the command without verify=true to continue it.",
                *(f"{manifest.rows if manifest else 0:,}", f"{self.n_tokens:,}"),
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
            check_same_key(self.store, manifest, here, "choose another cache_dir=...")
            self.data.norm_limits.update(manifest.norm_limits)
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
        manifest = Manifest(data.lm.name, self.key, whole, checksum, errors=errors, norm_limits=data.norm_limits)
        manifest.write(self.store)
        return manifest

    def _measure_errors(self) -> dict[str, dict[str, float]]:
        """Measure and log what the dtype costs, on held-out text; nothing if it holds all that the model's does."""
        lm_dtype, stored = self.data.lm.dtype, self.codec.stored
        if not self.codec.has_scales and torch.promote_types(stored, lm_dtype) == stored:
            return {}
        tokens = self.data.probe_text()
        rows = torch.cat([self.data.kept_activations(row) for row in tokens.split(1)])
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

    def _write_missing(self, manifest: Manifest) -> None:
        """Write the shards after the last one, up to n_tokens or the end of the text; save the manifest each time."""
        source: Source = self.data.source()
        source.load_state_dict(self._text_state(manifest))
        if self.data.prefetch:
            source = PrefetchedSource(source, 4 * self.data.lm_batch_rows * self.data.seq_len, self.data.lm.device)
        with TokenProgress("harvesting", self.n_tokens, manifest.rows) as bar:
            for chunks in gather_chunks(
                self.data.keep_short(source),
                self.n_tokens - manifest.rows,
                self.shard_tokens,
                self.codec.decoded,
                bar.advance,
            ):
                left = self.n_tokens - manifest.rows
                manifest.shards.append(self.write_shard(shard_name(len(manifest.shards)), chunks, left))
                manifest.complete = manifest.rows == self.n_tokens
                manifest.write(self.store)
                raise_if_stopped()
        if not manifest.complete:
            self._finish_early(manifest)

    def _finish_early(self, manifest: Manifest) -> None:
        """Mark the cache as complete at the end of the text; raise a UserError if it is empty."""
        if manifest.rows == 0:
            raise UserError(f"the text is shorter than one row of seq_len={self.data.seq_len} tokens: give more text.")
        log.warning("The text ended after %s of %s tokens.", f"{manifest.rows:,}", f"{self.n_tokens:,}")
        manifest.complete = True
        manifest.write(self.store)

    def _text_state(self, manifest: Manifest) -> dict[str, Any]:
        """Return the state of the text rows after the last shard."""
        rows = self.data.rows()
        if manifest.shards:
            last = manifest.shards[-1]
            rows.load_state_dict(last.begin)
            rows.take(last.text_rows)
        rows.close()
        return rows.state_dict()

    def write_shard(self, file: str, chunks: list[Chunk], limit: int) -> Shard:
        for chunk in chunks:  # finite in the language model's dtype; the cache's may hold less
            check_finite(chunk.rows, self.data.lm.sites, "give dtype=bfloat16.")
        return write_shard(self.store, file, chunks, limit, self.codec)

    def _rewrite_damaged(self, manifest: Manifest) -> None:
        """Verify all files and write damaged or missing ones again."""
        bad = find_damaged(self.store, manifest)
        for file in bad:
            log.warning("%s is damaged or missing: writing it again.", file)
        if HELD_OUT_FILE in bad:
            manifest.held_out_whole, manifest.held_out_checksum = self._write_held_out()
            manifest.write(self.store)
        for i, shard in enumerate(manifest.shards):
            raise_if_stopped()
            if shard.file in bad:
                source = self.data.source()
                source.load_state_dict(shard.begin)
                chunks = next(
                    gather_chunks(
                        self.data.keep_short(source), shard.rows, self.shard_tokens, self.codec.decoded, lambda n: None
                    )
                )
                manifest.shards[i] = self.write_shard(shard.file, chunks, shard.rows)
                manifest.write(self.store)


def gather_chunks(
    source: Source, n_rows: int, at_once: int, dtype: torch.dtype, advance: Callable[[int], None]
) -> Iterator[list[Chunk]]:
    """Yield consecutive chunks in lists of at least `at_once` rows, on the CPU and in this dtype, up to n_rows in all.

    The last list may have fewer rows. `advance` is called with the number of rows of each chunk.
    """
    chunks: list[Chunk] = []
    held = yielded = 0
    stream = iter(source)
    while yielded + held < n_rows and (chunk := next(stream, None)) is not None:
        chunks.append(chunk._replace(rows=chunk.rows.to("cpu", dtype)))
        held += len(chunk.rows)
        advance(len(chunk.rows))
        if held >= at_once:
            yield chunks
            yielded, held, chunks = yielded + held, 0, []
    stream.close()
    if held:
        yield chunks
