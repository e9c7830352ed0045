"""`data=cached`: batches from a cache, as a LightningDataModule."""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.activations.source import Source
from sae_lab.cache.key import lm_key
from sae_lab.cache.reader import Cache, CachedSource
from sae_lab.cache.shards import refuse_other
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import UserError


class CachedData(ActivationData):
    """`data=cached`: the same batches from activations that `sae_lab.harvest` put on disk; held-out text still runs.

    Args:
        path: the cache's folder or fsspec URL.
        stream: as in ActivationData; `seq_len` and the excluded positions are those of the harvest.

    Raises:
        UserError: no finished cache, one of another language model or other settings (the keys that differ are
            named), less held-out text in it than is asked for, a damaged file.
    """

    # Relative distance between the cache's first rows and the model's: rounding, and other kernels, stay below.
    TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}

    def __init__(self, lm: LanguageModel, path: str, **stream: Any):
        self.cache = Cache(path)
        super().__init__(lm, documents=None, **stream)
        here = lm_key(lm) | {"seq_len": self.seq_len}
        here |= {f"data.{name}": getattr(self, name) for name in ("exclude_bos", "exclude_first", "pack")}
        refuse_other(self.cache.store, self.cache.manifest, here, "use what it was harvested with, or harvest anew.")
        self._compare_first_rows()
        self.held_out_text(max(self.n_eval_tokens, self.n_val_tokens) // self.seq_len)  # before, not after, training

    def _compare_first_rows(self) -> None:
        """Refuse a model that computes other activations, whatever its flags: what no key names shows here."""
        shard = self.cache.shard(0)
        tokens = shard.tokens[: self.lm_batch_rows].long()
        x = self.lm.activations(tokens)[self.keep(tokens).to(self.lm.device)].float().cpu()
        x, cached = x[: len(shard.activations)], shard.activations[: len(x)].float()
        distance = ((x - cached).norm() / cached.norm()).item()
        key = self.cache.manifest.key
        if not distance <= max(self.TOLERANCE[key["dtype"]], self.TOLERANCE.get(key["lm.dtype"], 0)):
            raise UserError(
                f"{self.cache.store.url} holds activations that this language model does not compute "
                f"(they differ by {distance:.1%}): use the lm.* keys that it was harvested with, or harvest anew."
            )

    @cached_property
    def origin(self) -> dict[str, str]:
        return {}  # the place in a cache names the cache, whose key names all of that

    def text_rows(self, n: int) -> Int[Tensor, "n t"]:
        """Of those that the cache was harvested from, in its order."""
        found, shards = [torch.empty(0, self.seq_len, dtype=torch.long)], iter(range(len(self.cache.manifest.shards)))
        while sum(map(len, found)) < n and (number := next(shards, None)) is not None:
            found.append(self.cache.shard(number).tokens.long())
        return torch.cat(found)[:n]

    def source(self) -> Source:
        chunk_rows = self.lm_batch_rows * self.seq_len
        return CachedSource(self.cache, chunk_rows, self.seed, self.repeat, self.lm.device)

    def held_out_text(self, n: int) -> Int[Tensor, "n t"]:
        rows = self.cache.held_out()
        if n > len(rows) and not self.cache.manifest.held_out_whole:
            raise UserError(
                f"{self.cache.store.url} holds {rows.numel()} held-out tokens: ask for no more in data.n_eval_tokens "
                "and data.n_val_tokens, or harvest with a larger data.n_eval_tokens."
            )
        return rows[:n]
