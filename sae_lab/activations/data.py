"""Text -> frozen language model -> shuffled batches of activations, as a LightningDataModule that can resume."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, cached_property, partial
from threading import Lock
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from sae_lab.activations.digests import digest_of_rows
from sae_lab.activations.exclusions import Exclusions, token_ids
from sae_lab.activations.held_out import HeldOut, held_out_text, shuffled_rows
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.origin import digests_of, origin_of
from sae_lab.activations.passes import PassTokens, rows_per_pass
from sae_lab.activations.positions import Positions
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.previous import WithPrevious
from sae_lab.activations.source import LMSource, Source
from sae_lab.activations.stream import StreamData
from sae_lab.activations.text_batches import TextBatches, check_whole_rows
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.memory import check_memory_of
from sae_lab.text.documents import TRAIN
from sae_lab.text.rows import RowStream
from sae_lab.text.text import TextSource, TrainingText

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
        self.text, self.seq_len = text, text.seq_len
        check_length(text.seq_len, lm, exclude_first, exclude_bos)
        self._pass_size = (lm_batch_rows, lm_batch_tokens)
        self.fixed_rows = lm_batch_rows or 32  # on any device: for the digest of a text, and chunks of a cache
        self.lm_lock, self.text_lock = Lock(), Lock()
        exclusions = Exclusions(lm.bos_id, exclude_bos, exclude_first, token_ids(lm.tokenizer, exclude_tokens))
        probe_text = partial(self.held_out_rows, PROBE_TOKENS)
        self.positions = Positions(lm, exclusions, max_norm, probe_text, self.device)
        self._read(lm, rows_per_pass(lm, self.seq_len, *self._pass_size))
        if isinstance(text, TrainingText) and (exclude_tokens or max_norm is not None):
            self.positions.log_left_out()

    def _read(self, lm: LanguageModel, lm_batch_rows: int) -> None:
        """Read the sites of `lm`, from the beginning of the stream."""
        self.lm, self.lm_batch_rows = lm, lm_batch_rows
        self.name, self.sites, self.models, self.d_in, self.dtype = lm.name, lm.sites, lm.models, lm.d, lm.dtype
        self._train_on(lm, self.positions.mask)

    def _train_on(self, lm: Any, mask: Callable[[Tensor], Tensor]) -> None:
        """Train on what `lm` computes at the positions of a mask, from the beginning of the stream."""
        self._trained, self._mask = lm, mask
        self._copies = cache(lm.copies)  # made when the first rows are harvested: then the rank is known
        one_pass = self.lm_batch_rows * self.seq_len * self.bytes_per_token
        of_a_pass = "{lm_batch_tokens} tokens" if self._pass_size[0] is None else "{lm_batch_rows} rows"
        check_memory_of(lm.device, one_pass, f"the activations of {of_a_pass} take {{size}}: lower it.")
        self.begin()

    def with_sites(self, sites: Sequence[str], lm_batch_rows: int | None = None) -> Self:
        """Return the same data at other sites of the language model, from the beginning of the stream.

        They are the data that `lm.sites=sites` would build, but share the text, the language model and its lock.

        Args:
            lm_batch_rows: text rows per forward pass; None: as many as these data would take.
        """
        other, lm = copy(self), self.lm.with_sites(sites)
        other.__dict__.pop("validation_batches", None)
        other.positions = self.positions.at(lm)
        other._read(lm, lm_batch_rows or rows_per_pass(lm, self.seq_len, *self._pass_size))
        return other.in_whole_rows() if self.has_whole_rows else other

    def with_joined_sites(self, sites: Sequence[str]) -> Self:
        return self.with_sites(sites, self.lm_batch_rows)

    def shares_rows_with(self, other: Self) -> bool:
        """Return whether one pass over the same text gives the rows of both, at other sites but the same positions."""
        same_positions = self.positions.max_norm is None or set(self.sites) == set(other.sites)
        here, there = ((data.d_in, data.dtype, data.lm_batch_rows) for data in (self, other))
        return same_positions and here == there

    def with_previous(self) -> Self:
        if self.has_whole_rows:
            raise UserError("loss=kl_mse has batches of whole text rows, not of pairs: leave it out for this SAE.")
        other = copy(self)
        other._train_on(WithPrevious(self.lm), self.positions.pair_mask)
        return other

    def in_whole_rows(self) -> Self:
        if not isinstance(self.text, TrainingText):
            super().in_whole_rows()  # raises
        check_whole_rows(self.batch_size, self.n_tokens, self.seq_len, self.positions.are_by_place_alone)
        other = copy(self)
        sizes = (self.batch_size, self.n_tokens // self.seq_len, self.lm_batch_rows)
        other.stream = TextBatches(self.rows(), self.positions.read, self.seq_len, *sizes)
        return other

    @property
    def has_whole_rows(self) -> bool:
        """Whether a training batch is a TextBatch. n_tokens then counts positions that are left out as well."""
        return isinstance(self.stream, TextBatches)

    @property
    def bytes_per_token(self) -> int:
        return len(self._trained.sites) * self.d_in * self.dtype.itemsize

    @property
    def float32_forward_in_thread(self) -> bool:  # type: ignore[override]
        return self.prefetch and self.device.type != "cuda" and self.dtype == torch.float32

    def rows(self) -> RowStream:
        """Return the rows of token ids of the training text, from the beginning."""
        assert isinstance(self.text, TrainingText)
        return self.text.rows(TRAIN, self.repeat, self.n_tokens)

    def source(self) -> Source:
        """Return the training activations before shuffling, from the beginning."""
        return self.activations_of(self.rows())

    def activations_of(self, rows: RowStream) -> Source:
        """Return the activations of text rows, in their order."""
        locks = (self.lm_lock, self.text_lock)
        return LMSource(self._trained, rows, self._mask, self.lm_batch_rows, *locks, self._copies)

    def read_ahead(self, source: Any) -> InterleavedSource | PrefetchedSource:
        """Return the source in the form that computes chunks ahead on the language model's device."""
        if self.lm.device.type == "cuda":
            return InterleavedSource(source, self.lm.device)
        return PrefetchedSource(source, 0, self.lm.device)

    def keep_short(self, source: Source) -> Source:
        return self.positions.without_long(source)

    def held_out_rows(self, n_tokens: int) -> Int[Tensor, "n t"]:
        """Return the first held-out text rows, n_tokens in all, but at least one row; see `shuffled_rows`."""
        with self.text_lock:
            return shuffled_rows(self.text, n_tokens)

    def probe_rows(self, n: int = 16) -> Float[Tensor, "n s d"]:
        """Return activations at n positions spread over one held-out text row, on which a saved SAE is verified."""
        x = self.positions.activations(self.held_out_rows(self.seq_len))
        return x[:: max(1, len(x) // n)][:n]

    def setup(self, stage: str) -> None:
        if stage == "fit" and isinstance(self.text, TrainingText):
            with self.text_lock:
                self.text.prepare()  # here, because later the bar of the training is on the screen

    def validation_rows(self) -> Float[Tensor, "n s d"]:
        passes = self.held_out_rows(self.n_val_tokens).split(self.lm_batch_rows)
        with self.lm_lock:
            return torch.cat([self.positions.activations(tokens) for tokens in passes])

    def held_out(self, n_tokens: int) -> HeldOut:
        return held_out_text(
            self.held_out_rows(n_tokens), n_tokens, self.positions, self.batch_size, self.lm_batch_rows
        )

    def origin(self) -> dict[str, Any]:
        return origin_of(self.lm, self.text)

    @cached_property
    def source_digests(self) -> dict[str, str]:
        assert isinstance(self.text, TrainingText)
        with self.text_lock:
            return digests_of(self.lm, self.text)

    def digests_like(self, origin: dict[str, str]) -> dict[str, str]:
        here = self.source_digests
        if "the text" in origin and "the text" not in here:  # runs from before lm_batch_tokens recorded a pass
            return here | {"the text": digest_of_rows(self.text.first_rows(self.fixed_rows))}
        return here

    def share_state(self, data: Self) -> None:
        super().share_state(data)
        self.positions.limits = data.positions.limits

    def state_dict(self) -> dict[str, Any]:
        limits = {} if self.positions.max_norm is None else {"norm_limits": self.positions.limits}
        return super().state_dict() | limits

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream; raise a UserError if the text, the tokenizer or the language model changed."""
        state = dict(state_dict)
        limits = state.pop("norm_limits", {})
        super().load_state_dict(state)
        if self.positions.max_norm is not None:
            self.positions.limits.update(limits)


def device_of_blocks(lm: LanguageModel) -> torch.device:
    """Return the device on which blocks lie: the language model's; where it has devices of its own, this process's."""
    if lm.device.type == "cuda" and lm.devices:
        return torch.device("cuda", torch.cuda.current_device())
    return lm.device


def check_length(seq_len: int, lm: LanguageModel, exclude_first: int, exclude_bos: bool) -> None:
    """Raise a SettingError if text rows exceed the context of the language model, or nothing of them is kept."""
    if lm.context is not None and seq_len > lm.context:
        raise SettingError(f"{{seq_len}}={seq_len} is longer than the context of {lm.name}: give {lm.context} or less.")
    if exclude_first + exclude_bos >= seq_len:
        raise SettingError(
            f"{{exclude_first}}={exclude_first} leaves nothing of a row of {{seq_len}}={seq_len} tokens."
        )
