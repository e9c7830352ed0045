"""The files of a cache, as a language model, a text and settings decide them."""

import logging
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from sae_lab.activations.data import ActivationData
from sae_lab.activations.finite import check_finite
from sae_lab.activations.source import Chunk
from sae_lab.cache.codec import Codec, storage_errors
from sae_lab.cache.key import data_key, lm_key
from sae_lab.cache.shards import FORMAT, Manifest, Shard, check_same_key, write_held_out, write_shard
from sae_lab.cache.store import Store
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.memory import check_memory_of
from sae_lab.runtime.plain_text import plural

log = logging.getLogger(__name__)


class CacheFiles:
    """Writes the files of a cache: its manifest, the held-out text and the shards. Arguments as for CacheWriter.

    Attributes:
        key: every setting that decides a byte of the files; see key.py.
    """

    def __init__(
        self, data: ActivationData, store: Store, n_tokens: int, shard_tokens: int, dtype: str, compression: str
    ):
        self.data, self.store, self.n_tokens, self.shard_tokens = data, store, n_tokens, shard_tokens
        lm = lm_key(data.lm)
        stored = lm["lm.dtype"] if dtype == "auto" else dtype
        size = {"n_tokens": n_tokens, "shard_tokens": shard_tokens, "dtype": stored, "compression": compression}
        self.key: dict[str, Any] = {"format": FORMAT} | lm | data_key(data) | size
        self.codec = Codec.of(self.key)
        self._check_memory()

    def _check_memory(self) -> None:
        """Raise a SettingError if this machine cannot hold a shard that is computed and one that is written.

        Both are there in the language model's dtype. A write takes in addition

            stored + max(2 · stored, one site in the dtype that is read)

        because each site is joined before it is quantized, and safetensors serializes all into two copies. The peak
        that was measured is within 14 MiB of that for 64 MiB of bfloat16; zstd takes less.
        """
        sites, d, n = len(self.data.lm.sites), self.data.d_in, min(self.shard_tokens, self.n_tokens)
        stored = sites * self.codec.bytes_per_row(d)
        write = stored + max(2 * stored, d * self.codec.decoded.itemsize)
        computed = sites * d * self.data.lm.dtype.itemsize * min(2 * n, self.n_tokens)
        what = "a shard that is computed and one that is written take {size}: lower the tokens of a shard."
        check_memory_of(torch.device("cpu"), computed + n * write, what)

    def read_manifest(self, start_over: bool = False) -> Manifest | None:
        """Return the cache's manifest; None if there is none, or if it is damaged and `start_over` is set.

        Raises:
            UserError: the folder holds another cache, or the manifest is damaged.
        """
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

    def start(self) -> Manifest:
        """Log the size of the cache and its error, then write the held-out text and an empty manifest."""
        data, folder = self.data, self.store.folder
        bytes_per_token = len(data.lm.sites) * self.codec.bytes_per_row(data.d_in)
        free = "" if folder is None else f" ({shutil.disk_usage(folder).free / 1e9:.1f} GB are free on this disk)"
        log.info(
            "%s: %s tokens x %s x %d x %s = %.2f GB%s%s.",
            *(self.store.url, f"{self.n_tokens:,}", plural(len(data.lm.sites), "site"), data.d_in, self.key["dtype"]),
            self.n_tokens * bytes_per_token / 1e9,
            " before compression" if self.codec.compression != "none" else "",
            free,
        )
        errors = self._measure_errors()
        whole, checksum = self.write_held_out()
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

    def write_held_out(self) -> tuple[bool, str]:
        """Write the held-out text; return whether that is all there is, and the file's checksum."""
        wanted = max(1, self.data.n_eval_tokens // self.data.seq_len)
        held_out = self.data.text.held_out(wanted)
        return len(held_out) < wanted, write_held_out(self.store, held_out)

    def write_shard(self, file: str, chunks: Sequence[Chunk], limit: int | None = None) -> Shard:
        """Write the first `limit` rows of consecutive chunks to one file; None: all.

        Raises:
            UserError: they overflow the dtype of the cache, or there is none.
        """
        for chunk in chunks:  # finite in the language model's dtype; the cache's may hold less
            check_finite(chunk.rows.to(self.codec.decoded), self.data.lm.sites, "give dtype=bfloat16.")
        shard = write_shard(self.store, file, chunks, limit, self.codec)
        if shard.rows == 0:
            raise UserError(
                f"data.exclude_... and data.max_norm leave out all {shard.text_rows * self.data.seq_len} tokens of "
                f"{file}: leave out fewer, or raise shard_tokens={self.shard_tokens}."
            )
        return shard

    def complete(self, manifest: Manifest, shards: list[Shard]) -> None:
        """List the shards that were harvested in the manifest; raise a UserError if the text had no row."""
        manifest.shards += shards
        if manifest.rows == 0:
            raise UserError(f"the text is shorter than one row of seq_len={self.data.seq_len} tokens: give more text.")
        if manifest.rows < self.n_tokens:
            log.warning("The text ended after %s of %s tokens.", f"{manifest.rows:,}", f"{self.n_tokens:,}")
        manifest.complete = True
        manifest.write(self.store)
