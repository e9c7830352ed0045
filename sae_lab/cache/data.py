"""`data=cached`: a LightningDataModule of batches from a cache."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Self

from sae_lab.activations.contract import ActivationRows
from sae_lab.activations.data import ActivationData
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Source
from sae_lab.cache.key import lm_key
from sae_lab.cache.pieces import PIECE
from sae_lab.cache.reader import Cache, CachedSource
from sae_lab.cache.shards import check_same_key
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.checks import check_arguments, show
from sae_lab.runtime.errors import UserError
from sae_lab.text.text import TextSource


class CachedText(TextSource):
    """The text rows of a cache."""

    def __init__(self, cache: Cache, seq_len: int):
        self.cache, self.seq_len = cache, seq_len

    def first_rows(self, n: int) -> Int[Tensor, "r t"]:
        """Return the first n text rows that the cache was harvested from, or as many as it has."""
        found, shards = [torch.empty(0, self.seq_len, dtype=torch.long)], iter(range(len(self.cache.manifest.shards)))
        while sum(map(len, found)) < n and (number := next(shards, None)) is not None:
            found.append(self.cache.shard(number).tokens.long())
        return torch.cat(found)[:n]

    def reading(self) -> dict[str, Any]:
        return self.cache.manifest.key.get("data.reading", {})

    def held_out(self, n: int) -> Int[Tensor, "r t"]:
        """Return the first n held-out rows; raise a UserError if the cache has fewer, though the text had more."""
        rows = self.cache.held_out()
        if n > len(rows) and not self.cache.manifest.held_out_whole:
            raise UserError(
                f"{self.cache.store.url} holds only {rows.numel()} held-out tokens: lower data.n_eval_tokens and "
                "data.n_val_tokens, or harvest into another cache_dir with a larger data.n_eval_tokens."
            )
        return rows[:n]


class CachedData(ActivationData):
    """Batches `(b, s, d)` of activations that `sae_lab.harvest` wrote to disk.

    The language model is still needed: the evaluation runs it on the held-out text of the cache.

    Args:
        lm: the language model that the cache was harvested from. Its sites are some of the cache's, in any order.
        path: folder or fsspec URL of the cache.
        copies_gb: gigabytes that copies of remote shards may take on this machine, in all. A remote cache that is
            larger is not copied: its pieces are read from the server when they are needed. Changes no row.
        stream: the other arguments of ActivationData; `seq_len`, `pack` and the excluded positions must be those of the
            harvest.

    Raises:
        UserError: the cache is missing, unfinished or damaged; it lacks a site of `lm`; it was harvested from another
            language model or with other settings (the message names them); it holds less held-out text than requested.
    """

    # Largest relative distance allowed between the cache's first rows and the same rows computed now. Rounding to the
    # dtype and different kernels stay below it.
    TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.1, "float8_e4m3": 0.1}

    @check_arguments
    def __init__(
        self,
        lm: LanguageModel,
        path: str,
        *,
        seq_len: Annotated[int, Ge(2)],
        pack: bool,
        copies_gb: Annotated[float, Ge(0)] = 100.0,
        **stream: Any,
    ):
        self.cache = Cache(path, int(copies_gb * 1e9))
        super().__init__(lm, CachedText(self.cache, seq_len), **stream)
        here = lm_key(lm) | {"lm.sites": self.cache.manifest.key["lm.sites"], "seq_len": seq_len, "data.pack": pack}
        here |= {f"data.{name}": value for name, value in self.positions.settings().items()}
        check_same_key(
            self.cache.store,
            self.cache.manifest,
            here,
            "use the settings of the cache, or harvest into another cache_dir.",
        )
        self._compare_first_rows()
        self.text.held_out(max(self.n_eval_tokens, self.n_val_tokens) // self.seq_len)  # fails before training starts

    def _read(self, lm: LanguageModel, lm_batch_rows: int) -> None:
        self.positions.limits = self.cache.manifest.norm_limits
        super()._read(lm, lm_batch_rows)

    def with_sites(self, sites: Sequence[str], lm_batch_rows: int | None = None) -> Self:
        other = super().with_sites(sites, lm_batch_rows)
        other._compare_first_rows()
        return other

    def with_previous(self) -> Self:
        return ActivationRows.with_previous(self)  # raises: a cache gives its rows in another order

    def _compare_first_rows(self) -> None:
        """Compute the cache's first rows again and compare: this finds differences that the key does not cover."""
        shard = self.cache.shard(0)
        tokens = shard.tokens[: self.lm_batch_rows].long()
        x = self.positions.activations(tokens).float().cpu()
        if self.positions.max_norm is not None:  # a row at the limit may be kept in one place only, and shift others
            x = x[:PIECE]
        n_pieces = min(-(-len(x) // PIECE), self.cache.manifest.shards[0].pieces)
        cached = torch.cat([shard.piece(i, self._columns) for i in range(n_pieces)]).float()[: len(x)]
        x = x[: len(cached)]
        distance = ((x - cached).norm() / cached.norm()).item()
        key = self.cache.manifest.key
        if not distance <= max(self.TOLERANCE[key["dtype"]], self.TOLERANCE.get(key["lm.dtype"], 0)):
            raise UserError(
                f"{self.cache.store.url} holds activations that this language model does not compute "
                f"(they differ by {distance:.1%}): use the lm.* keys that it was harvested with, or harvest into "
                "another cache_dir."
            )

    def read_ahead(self, source: Source) -> PrefetchedSource:
        return PrefetchedSource(source, 0, self.device)  # a thread, since reading files releases the lock

    @property
    def float32_forward_in_thread(self) -> bool:  # type: ignore[override]
        return False  # the thread reads files

    @cached_property
    def source_digests(self) -> dict[str, str]:
        return {}  # the state of CachedSource names the cache, whose key already includes model, tokenizer and text

    def keep_short(self, source: Source) -> Source:
        return source  # the harvest left the others out

    @property
    def _columns(self) -> list[int]:
        """The columns of the cache that hold the sites, in the order asked for.

        Raises:
            UserError: the cache does not hold a site, or chose its rows by other sites too.
        """
        there = self.cache.manifest.key["lm.sites"]
        if missing := [site for site in self.lm.sites if site not in there]:
            raise UserError(
                f"{self.cache.store.url} holds {show(there)} of {self.lm.name}, not {show(missing)}: "
                "choose lm.sites among these, or harvest into another cache_dir."
            )
        if self.cache.manifest.norm_limits and set(self.lm.sites) != set(there):
            raise UserError(
                f"{self.cache.store.url} leaves out rows by their norms at {show(there)} (data.max_norm): "
                "read all of these sites, or harvest into another cache_dir."
            )
        return [there.index(site) for site in self.lm.sites]

    def source(self) -> Source:
        chunk_rows = self.fixed_rows * self.seq_len  # decides the order of the rows, so no device may
        return CachedSource(self.cache, chunk_rows, self.seed, self.repeat, self.device, self._columns)
