"""Text -> frozen language model -> shuffled batches of activations, as a LightningDataModule that can resume."""

import logging
import math
from collections.abc import Sequence
from copy import copy
from functools import cache, cached_property
from threading import Lock
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.digests import digest_of_rows, weights_digest
from sae_lab.activations.exclusions import Exclusions, ShortRows, is_short, norm_limits, token_ids
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.passes import PassTokens, TextPass, batch_sizes, plan_passes, rows_per_pass
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.previous import WithPrevious, has_previous
from sae_lab.activations.source import LMSource, Source
from sae_lab.activations.stream import Batches, HeldOut, HeldOutRows, StreamData
from sae_lab.activations.text_batches import TextBatches, WholeBatches
from sae_lab.activations.workers import kept_activations
from sae_lab.lm.base import LanguageModel
from sae_lab.parallel.mesh import data_axis
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.memory import check_memory_of
from sae_lab.text.documents import TRAIN
from sae_lab.text.rows import RowStream
from sae_lab.text.text import TextSource, TrainingText

log = logging.getLogger(__name__)

PROBE_TOKENS = 4096
"""Held-out tokens on which the median norm and the error of a cache's dtype are measured."""
Tokens = Annotated[list[int | str], ErrorMessage("must be a list of token ids or strings, such as [0,' the']")]


class ActivationData(StreamData):
    """Batches `(b, s, d)` of a frozen language model's activations, shuffled, deterministic in (config, seed).

    Args:
        lm: the language model and its sites. It is never part of a checkpoint.
        text: rows of token ids of the splits `train` and `held_out`.
        lm_batch_rows: text rows per forward pass of the language model; None: as many as have lm_batch_tokens.
        exclude_bos: leave out every BOS token.
        exclude_first: leave out the first n positions of each row.
        exclude_tokens: leave out these tokens wherever they stand: ids, or strings that are one token.
        max_norm: leave out a row whose norm is more than so many times the median norm at any site (see is_short).
        lm_batch_tokens: tokens per forward pass of the language model, rounded down to whole rows; "auto" is 4,096 on a
            CPU and 32,768 on a GPU, or fewer where these would take more than an eighth of its memory.
        stream: the other arguments of StreamData.

    Raises:
        UserError: there are fewer tokens than one batch, or no position of a row is left after the exclusions.
    """

    whole_rows = False
    """Whether a training batch is a TextBatch; see `in_whole_rows`. n_tokens then counts positions that are left out
    as well."""

    @check_arguments
    def __init__(
        self,
        lm: LanguageModel,
        text: TextSource,
        *,
        lm_batch_rows: Annotated[int, Ge(1)] | None,
        exclude_bos: bool,
        exclude_first: Annotated[int, Ge(0)],
        lm_batch_tokens: PassTokens = "auto",
        exclude_tokens: Tokens = [],  # noqa: B006  read only
        max_norm: Annotated[float, Gt(1)] | None = None,
        **stream: Any,
    ):
        super().__init__(device_of_blocks(lm), **stream)
        seq_len = text.seq_len
        if lm.context is not None and seq_len > lm.context:
            raise SettingError(
                f"{{seq_len}}={seq_len} is longer than the context of {lm.name}: give {lm.context} or less."
            )
        if exclude_first + exclude_bos >= seq_len:
            raise SettingError(
                f"{{exclude_first}}={exclude_first} leaves nothing of a row of {{seq_len}}={seq_len} tokens."
            )
        self.text, self.seq_len = text, seq_len
        self._pass_size = (lm_batch_rows, lm_batch_tokens)
        self.fixed_rows = lm_batch_rows or 32  # on any device: for the digest of a text, and chunks of a cache
        self.exclude_bos, self.exclude_first, self.max_norm = exclude_bos, exclude_first, max_norm
        self.exclude_tokens = list(token_ids(lm.tokenizer, exclude_tokens))
        self.lm_lock, self.text_lock, self.pairs = Lock(), Lock(), False
        self._begin(lm, rows_per_pass(lm, seq_len, *self._pass_size))
        if isinstance(text, TrainingText) and (self.exclude_tokens or max_norm is not None):
            self._log_left_out()

    def _begin(self, lm: LanguageModel, lm_batch_rows: int) -> None:
        """Read the sites of `lm`, from the beginning of the stream."""
        self.lm, self.lm_batch_rows = lm, lm_batch_rows
        self._copies = cache(lambda: lm.copies())  # made when the first rows are harvested: then the rank is known
        one_pass = lm_batch_rows * self.seq_len * self.bytes_per_token
        of_a_pass = "{lm_batch_tokens} tokens" if self._pass_size[0] is None else "{lm_batch_rows} rows"
        check_memory_of(lm.device, one_pass, f"the activations of {of_a_pass} take {{size}}: lower it.")
        self.begin()

    def with_sites(self, sites: Sequence[str], lm_batch_rows: int | None = None) -> "ActivationData":
        """Return the same data at other sites of the language model, from the beginning of the stream.

        They are the data that `lm.sites=sites` would build, but share the text, the language model and its lock.

        Args:
            lm_batch_rows: text rows per forward pass; None: as many as these data would take.
        """
        other = copy(self)
        for of_sites in ("validation_batches", "norm_limits"):
            other.__dict__.pop(of_sites, None)
        lm = self.lm.with_sites(sites)
        other._begin(lm, lm_batch_rows or rows_per_pass(lm, self.seq_len, *self._pass_size))
        return other

    def with_joined_sites(self, sites: Sequence[str]) -> "ActivationData":
        return self.with_sites(sites, self.lm_batch_rows)

    def shares_rows_with(self, other: StreamData) -> bool:
        """Return whether one pass over the same text gives the rows of both, at other sites but the same positions."""

        def row(data: StreamData) -> tuple[Any, ...]:
            assert isinstance(data, ActivationData)
            return data.d_in, data.dtype, data.lm_batch_rows, data.max_norm is not None and set(data.sites)

        return row(self) == row(other)

    def with_previous(self) -> StreamData:
        if self.whole_rows:
            raise UserError("loss=kl_mse has batches of whole text rows, not of pairs: leave it out for this SAE.")
        other = copy(self)
        other.pairs = True
        other._begin(self.lm, self.lm_batch_rows)
        return other

    @property
    def bytes_per_token(self) -> int:
        return super().bytes_per_token * (1 + self.pairs)

    @property
    def float32_forward_in_thread(self) -> bool:  # type: ignore[override]
        return self.prefetch and self.device.type != "cuda" and self.dtype == torch.float32

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.lm.name

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.lm.sites

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.lm.models

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.lm.d

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.lm.dtype

    @property
    def exclusions(self) -> Exclusions:
        return Exclusions(self.lm.bos_id, self.exclude_bos, self.exclude_first, tuple(self.exclude_tokens))

    def keep_mask(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that are not left out for their token or place; `max_norm` may leave fewer."""
        return self.exclusions.keep(tokens)

    def pair_mask(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that make pairs with the position before."""
        return has_previous(tokens, self.keep_mask(tokens), self.lm.bos_id)

    def keep_positions(self, tokens: Int[Tensor, "n t"], activations: Float[Tensor, "n t s d"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions on which an SAE is trained and evaluated."""
        keep = self.keep_mask(tokens)
        return keep if self.max_norm is None else keep & self._is_short(activations).to(keep.device)

    def kept(self, tokens: Int[Tensor, "n t"]) -> tuple[Bool[Tensor, "n t"], Float[Tensor, "m s d"]]:
        """Return a mask of the positions on which an SAE is trained and evaluated, and the activations there.

        Raises:
            UserError: they are not finite.
        """
        keep = self.keep_mask(tokens)
        rows = kept_activations(self.lm, tokens, keep)
        if self.max_norm is not None:
            short = self._is_short(rows)
            keep, rows = keep.masked_scatter(keep, short.to(keep.device)), rows[short]
        return keep, rows.to(self.device)

    def kept_activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "m s d"]:
        """Return the activations at the positions on which an SAE is trained and evaluated."""
        return self.kept(tokens)[1]

    def keep_short(self, source: Source) -> Source:
        """Return the source without the rows that `max_norm` leaves out."""
        return source if self.max_norm is None else ShortRows(source, self._is_short)

    def _is_short(self, rows: Float[Tensor, "*n s d"]) -> Bool[Tensor, "*n"]:
        limits = [self.norm_limits[site] for site in self.lm.sites]
        return is_short(rows, limits * (rows.shape[-2] // len(limits)))  # a pair has the sites twice

    @cached_property
    def norm_limits(self) -> dict[str, float]:
        """The largest norm of a row to keep, by site; empty without `max_norm`. Part of the state of a run or a cache.

        The median is that of the probe text, one text row after the other, so no size of a pass or a block changes it.
        """
        if self.max_norm is None:
            return {}
        rows = [kept_activations(self.lm, row, self.keep_mask(row)) for row in self.probe_text().split(1)]
        return norm_limits(torch.cat(rows), self.lm.sites, self.max_norm)

    def _log_left_out(self) -> None:
        """Log the share of the probe text that each key leaves out; of max_norm, of what the others leave."""
        tokens = self.probe_text()
        shares = {f"data.{key}": mask.float().mean().item() for key, mask in self.exclusions.masks(tokens).items()}
        if self.max_norm is not None:
            kept = sum(int(self.kept(row)[0].sum()) for row in tokens.split(1))
            shares["data.max_norm"] = 1 - kept / max(1, int(self.keep_mask(tokens).sum()))
        shown = ", ".join(f"{key} {share:.2%}" for key, share in shares.items() if share)
        log.info("Left out of %s held-out tokens: %s.", f"{tokens.numel():,}", shown or "none")

    def in_whole_rows(self) -> "ActivationData":
        if not isinstance(self.text, TrainingText):
            super().in_whole_rows()
        if self.batch_size % self.seq_len:
            fits = self.seq_len * max(1, self.batch_size // self.seq_len)
            raise SettingError(
                f"{{batch_size}}={self.batch_size} is not a multiple of {{seq_len}}={self.seq_len}, but loss=kl_mse "
                f"takes whole text rows: give {{batch_size}}={fits}."
            )
        if (n := data_axis().size) > 1:
            self._check_shares_of_rows(n)
        other = copy(self)
        other.whole_rows = True
        other.begin()
        return other

    def _check_shares_of_rows(self, n: int) -> None:
        """Raise a SettingError unless n ranks have equally many text rows of every batch, and positions in them."""
        at_once = n * self.seq_len
        if self.batch_size % at_once or self.n_tokens % at_once:
            raise SettingError(
                f"{{batch_size}}={self.batch_size} and {{n_tokens}}={self.n_tokens} must be multiples of {at_once}: "
                f"loss=kl_mse takes whole text rows of {{seq_len}}={self.seq_len}, as many for each of {n} processes."
            )
        if self.exclude_bos or self.exclude_tokens or self.max_norm is not None:
            raise SettingError(
                "{exclude_bos}, {exclude_tokens} and {max_norm} leave processes with different numbers of positions, "
                "and loss=kl_mse takes whole text rows: leave them out, or give trainer.devices=1."
            )

    def begin(self) -> None:
        super().begin()
        if self.whole_rows:
            sizes = (self.seq_len, self.rows_per_batch, self.n_tokens // self.seq_len)
            self.stream = TextBatches(self.rows(), self._kept_by_pass, *sizes)

    @property
    def rows_per_batch(self) -> int:
        """Text rows of a TextBatch."""
        return self.batch_size // self.seq_len

    def train_dataloader(self) -> Batches | WholeBatches:
        if not self.whole_rows:
            return super().train_dataloader()
        return WholeBatches(self.stream, math.ceil(self.n_tokens // self.seq_len / self.rows_per_batch))

    def _kept_by_pass(self, tokens: Int[Tensor, "n t"]) -> tuple[Bool[Tensor, "n t"], Float[Tensor, "m s d"]]:
        """Return what `kept` does, from passes of lm_batch_rows."""
        parts = [self.kept(part) for part in tokens.split(self.lm_batch_rows)]
        return torch.cat([keep for keep, _ in parts]), torch.cat([x for _, x in parts])

    def rows(self) -> RowStream:
        """Return the rows of token ids of the training text, from the beginning."""
        assert isinstance(self.text, TrainingText)
        return self.text.rows(TRAIN, self.repeat, self.n_tokens)

    def source(self) -> Source:
        """Return the training activations before shuffling, from the beginning."""
        return self.activations_of(self.rows())

    def activations_of(self, rows: RowStream) -> Source:
        """Return the activations of text rows, in their order."""
        of_lm = (self.lm_batch_rows, self.lm_lock, self.text_lock)
        if not self.pairs:
            return LMSource(self.lm, rows, self.keep_mask, *of_lm, self._copies)

        def pairs_of_copies() -> list[Any]:
            return [WithPrevious(lm) for lm in self._copies()]

        lm: Any = WithPrevious(self.lm)
        return LMSource(lm, rows, self.pair_mask, *of_lm, pairs_of_copies)

    def read_ahead(self, source: Any) -> InterleavedSource | PrefetchedSource:
        """Return the source in the form that computes chunks ahead on the language model's device."""
        if self.lm.device.type == "cuda":
            return InterleavedSource(source, self.lm.device)
        return PrefetchedSource(source, 0, self.lm.device)

    def held_out_rows(self, n_tokens: int) -> Int[Tensor, "n t"]:
        """Return the first held-out text rows, n_tokens in all, but at least one row and at most one pass.

        They are shuffled, always in the same way, so that consecutive rows come from different documents.
        """
        with self.text_lock:
            rows = self.text.held_out(max(1, n_tokens // self.seq_len))
        if len(rows) == 0:
            raise UserError(
                f"the held-out text is shorter than one row of seq_len={self.seq_len} tokens: "
                "give more text, or lower seq_len."
            )
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    def probe_text(self) -> Int[Tensor, "n t"]:
        """Return held-out text rows of PROBE_TOKENS in all, at least one: the same whatever the seed and the sizes."""
        return self.held_out_rows(PROBE_TOKENS)

    def probe_rows(self, n: int = 16) -> Float[Tensor, "n s d"]:
        """Return activations at n positions spread over one held-out text row, on which a saved SAE is verified."""
        x = self.kept_activations(self.held_out_rows(self.seq_len))
        return x[:: max(1, len(x) // n)][:n]

    def setup(self, stage: str) -> None:
        if stage == "fit" and isinstance(self.text, TrainingText):
            with self.text_lock:
                self.text.prepare()  # here, because later the bar of the training is on the screen

    def validation_rows(self) -> Float[Tensor, "n s d"]:
        chunks = self.held_out_rows(self.n_val_tokens).split(self.lm_batch_rows)
        with self.lm_lock:
            return torch.cat([self.kept_activations(tokens) for tokens in chunks])

    def held_out(self, n_tokens: int) -> HeldOut:
        """Return the first held-out text rows, in parts of whole rows that hold about a training batch.

        Raises:
            UserError: every position is left out.
        """
        rows = self.held_out_rows(n_tokens)
        parts = [*plan_passes(rows, self.batch_size, self.lm_batch_rows)]
        if not any(self.keep_mask(tokens).any() for tokens, _ in parts):
            raise UserError("data.exclude_* leaves out every held-out token: raise data.n_eval_tokens.")
        return HeldOut(parts, rows.numel(), len(rows) < n_tokens // self.seq_len)

    def held_out_rows_of(self, part: TextPass) -> HeldOutRows:
        keep, x = self.kept(part.tokens)
        return HeldOutRows(x, batch_sizes(keep, part.rows), part.tokens[keep] == self.lm.bos_id)

    def origin(self) -> dict[str, Any]:
        lm = self.lm
        return {
            "model": {"name": lm.name, "revision": getattr(getattr(lm.model, "config", None), "_commit_hash", None)},
            "sites": list(lm.sites),
            "tokenizer": {"name": lm.tokenizer.name_or_path, "vocab_size": len(lm.tokenizer)},
            "reading": dict(self.text.reading()),
            "bos": {"id": lm.bos_id, "policy": "first in every row of seq_len tokens, and between documents"},
        }

    @cached_property
    def source_digests(self) -> dict[str, str]:
        """Digests of what determines the batches besides the config; they must be the same when a run resumes."""
        assert isinstance(self.text, TrainingText)
        with self.text_lock:
            digest = self.text.identity()
            of_text = {"the text": digest} if digest else {"the first rows of the text": self._first_rows_digest(32)}
            of_readers = self.text.reader_digests()
        return {"the language model's weights": weights_digest(self.lm.model), **of_readers, **of_text}

    def _first_rows_digest(self, n: int) -> str:
        return digest_of_rows(self.text.first_rows(n))

    def share_state(self, data: StreamData) -> None:
        super().share_state(data)
        assert isinstance(data, ActivationData)
        self.norm_limits = data.norm_limits

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self.max_norm is None else {"norm_limits": self.norm_limits})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream; raise a UserError if the text, the tokenizer or the language model changed."""
        state = dict(state_dict)
        limits = state.pop("norm_limits", {})
        super().load_state_dict(state)
        if self.max_norm is not None:
            self.norm_limits.update(limits)

    def digests_like(self, origin: dict[str, str]) -> dict[str, str]:
        here = self.source_digests
        if "the text" in origin and "the text" not in here:  # before lm_batch_tokens, by the rows of a pass
            return here | {"the text": self._first_rows_digest(self.fixed_rows)}
        return here


def device_of_blocks(lm: LanguageModel) -> torch.device:
    """Return the device on which blocks lie: the language model's; where it has devices of its own, this process's."""
    if lm.device.type == "cuda" and lm.devices:
        return torch.device("cuda", torch.cuda.current_device())
    return lm.device
