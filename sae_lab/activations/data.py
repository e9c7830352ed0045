"""Text -> frozen language model -> shuffled batches of activations, as a LightningDataModule that can resume."""

import logging
import math
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from threading import Lock
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.digests import check_unchanged, digest_of_rows, weights_digest
from sae_lab.activations.exclusions import Exclusions, ShortRows, is_short, norm_limits, token_ids
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.passes import PassTokens, rows_per_pass
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import LMSource, SharedSource, Source, kept_activations
from sae_lab.lm.base import LanguageModel
from sae_lab.parallel.collectives import rank, rank_share, world_size
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


class Batches:
    """Iterable for Lightning over the first n_rows rows of the stream; the last batch may be smaller.

    With several processes, each gets its share of every batch. The length is defined because Lightning otherwise reads
    one batch ahead.
    """

    def __init__(self, stream: ShuffledBlocks, n_rows: int):
        self.stream, self.n_rows = stream, n_rows

    def __len__(self) -> int:
        return math.ceil(self.n_rows / self.stream.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        while (left := self.n_rows - self.stream.n_batches_given * self.stream.batch_size) > 0:
            batch = next(self.stream, None)
            if batch is None:
                return
            mine = rank_share(batch[:left])
            if len(mine) == 0:
                return
            yield mine


class ActivationData(L.LightningDataModule):
    """Batches `(b, s, d)` of a frozen language model's activations, shuffled, deterministic in (config, seed).

    Args:
        lm: the language model and its sites. It is never part of a checkpoint.
        text: rows of token ids of the splits `train` and `held_out`.
        batch_size: activations (tokens) per training batch.
        n_tokens: exact number of activations to train on; the last batch may be smaller.
        block_tokens: activations that are shuffled together, at most those of the run. A block takes
            block_tokens · s · d · bytes of `lm.dtype`, twice that with prefetch.
        lm_batch_rows: text rows per forward pass of the language model; None: as many as have lm_batch_tokens.
        exclude_bos: leave out every BOS token.
        exclude_first: leave out the first n positions of each row.
        exclude_tokens: leave out these tokens wherever they stand: ids, or strings that are one token.
        max_norm: leave out a row whose norm is more than so many times the median norm at any site (see is_short).
        prefetch: compute the next block during training: on a GPU between the steps, on a CPU in a thread. Does not
            change any row. "auto" is true on a GPU.
        repeat: start a new pass over the text if it ends before n_tokens; otherwise the run ends there.
        n_eval_tokens: held-out tokens of the evaluation after training.
        n_val_tokens: held-out tokens of the validation during training.
        seed: seed of the shuffling of activations.
        lm_batch_tokens: tokens per forward pass of the language model, rounded down to whole rows; "auto" is 4,096 on a
            CPU and 32,768 on a GPU, or fewer where these would take more than an eighth of its memory.

    Raises:
        UserError: there are fewer tokens than one batch, or no position of a row is left after the exclusions.
    """

    @check_arguments
    def __init__(
        self,
        lm: LanguageModel,
        text: TextSource,
        *,
        batch_size: Annotated[int, Ge(1)],
        n_tokens: Annotated[int, Ge(1)],
        block_tokens: Annotated[int, Ge(1)],
        lm_batch_rows: Annotated[int, Ge(1)] | None,
        exclude_bos: bool,
        exclude_first: Annotated[int, Ge(0)],
        prefetch: bool | Literal["auto"],
        repeat: bool,
        n_eval_tokens: Annotated[int, Ge(1)],
        n_val_tokens: Annotated[int, Ge(1)],
        seed: Annotated[int, Ge(0)],
        lm_batch_tokens: PassTokens = "auto",
        exclude_tokens: Tokens = [],  # noqa: B006  read only
        max_norm: Annotated[float, Gt(1)] | None = None,
    ):
        super().__init__()
        seq_len = text.seq_len
        if lm.context is not None and seq_len > lm.context:
            raise SettingError(
                f"{{seq_len}}={seq_len} is longer than the context of {lm.name}: give {lm.context} or less."
            )
        if n_tokens < batch_size:
            raise SettingError(
                f"{{n_tokens}}={n_tokens} is less than one batch of {{batch_size}}={batch_size}: raise {{n_tokens}}."
            )
        if exclude_first + exclude_bos >= seq_len:
            raise SettingError(
                f"{{exclude_first}}={exclude_first} leaves nothing of a row of {{seq_len}}={seq_len} tokens."
            )
        self.text, self.seed, self.repeat = text, seed, repeat
        self.seq_len, self.batch_size, self.n_tokens = seq_len, batch_size, n_tokens
        # Activations after the run's last batch are never used, so a short run does not wait for a full block.
        self.block_tokens = min(block_tokens, math.ceil(n_tokens / batch_size) * batch_size)
        self._pass_size = (lm_batch_rows, lm_batch_tokens)
        self.fixed_rows = lm_batch_rows or 32  # on any device: for the digest of a text, and chunks of a cache
        self.exclude_bos, self.exclude_first, self.max_norm = exclude_bos, exclude_first, max_norm
        self.exclude_tokens = list(token_ids(lm.tokenizer, exclude_tokens))
        self.n_eval_tokens, self.n_val_tokens = n_eval_tokens, n_val_tokens
        self.prefetch = prefetch is True or (prefetch == "auto" and lm.device.type == "cuda")
        self.lm_lock = Lock()
        self._begin(lm, rows_per_pass(lm, seq_len, *self._pass_size))
        if isinstance(text, TrainingText) and (self.exclude_tokens or max_norm is not None):
            self._log_left_out()

    def _begin(self, lm: LanguageModel, lm_batch_rows: int) -> None:
        """Read the sites of `lm`, from the beginning of the stream."""
        self.lm, self.lm_batch_rows = lm, lm_batch_rows
        self._check_memory()
        self.stream = self.new_stream(self.prefetch)

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

    def shares_rows_with(self, other: "ActivationData") -> bool:
        """Return whether one pass over the same text gives the rows of both, at other sites but the same positions."""

        def row(data: "ActivationData") -> tuple[Any, ...]:
            return data.d_in, data.lm.dtype, data.lm_batch_rows, data.max_norm is not None and set(data.lm.sites)

        return row(self) == row(other)

    @property
    def bytes_per_token(self) -> int:
        return len(self.lm.sites) * self.lm.d * self.lm.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Memory of one block of activations at all sites."""
        return max(self.block_tokens, self.batch_size) * self.bytes_per_token

    def _check_memory(self) -> None:
        """Raise a SettingError if a block or a forward pass exceeds the memory of the language model's device."""
        check_memory_of(
            self.lm.device,
            self.block_bytes,
            "a block takes {size}: lower {block_tokens}, or {batch_size} if that is larger.",
        )
        one_pass = self.lm_batch_rows * self.seq_len * self.bytes_per_token
        of_a_pass = "{lm_batch_tokens} tokens" if self._pass_size[0] is None else "{lm_batch_rows} rows"
        check_memory_of(self.lm.device, one_pass, f"the activations of {of_a_pass} take {{size}}: lower it.")

    @property
    def n_steps(self) -> int:
        return len(self.train_dataloader())

    @property
    def float32_forward_in_thread(self) -> bool:
        """Whether a thread computes float32 products of the language model during training steps."""
        return self.prefetch and self.lm.device.type != "cuda" and self.lm.dtype == torch.float32

    @property
    def d_in(self) -> int:
        return self.lm.d

    @property
    def n_sources(self) -> int:
        return len(self.lm.sites)

    @property
    def exclusions(self) -> Exclusions:
        return Exclusions(self.lm.bos_id, self.exclude_bos, self.exclude_first, tuple(self.exclude_tokens))

    def keep_mask(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that are not left out for their token or place; `max_norm` may leave fewer."""
        return self.exclusions.keep(tokens)

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
        return keep, rows

    def kept_activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "m s d"]:
        """Return the activations at the positions on which an SAE is trained and evaluated."""
        return self.kept(tokens)[1]

    def keep_short(self, source: Source) -> Source:
        """Return the source without the rows that `max_norm` leaves out."""
        return source if self.max_norm is None else ShortRows(source, self._is_short)

    def _is_short(self, rows: Float[Tensor, "*n s d"]) -> Bool[Tensor, "*n"]:
        return is_short(rows, [self.norm_limits[site] for site in self.lm.sites])

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

    def rows(self) -> RowStream:
        """Return the rows of token ids of the training text, from the beginning."""
        assert isinstance(self.text, TrainingText)
        return self.text.rows(TRAIN, self.repeat, self.n_tokens)

    def source(self) -> Source:
        """Return the training activations before shuffling, from the beginning."""
        return LMSource(self.lm, self.rows(), self.keep_mask, self.lm_batch_rows, self.lm_lock)

    def new_stream(self, prefetch: bool = False) -> ShuffledBlocks:
        """Return the stream of shuffled training batches, from the beginning."""
        source, size = self.source(), (self.block_tokens, self.batch_size, self.seed)
        if not prefetch:
            return ShuffledBlocks(self.keep_short(SharedSource(source)), *size)
        ahead = self.read_ahead(source)
        return ShuffledBlocks(self.keep_short(SharedSource(ahead)), *size, self.n_tokens, ahead.prepare)

    def read_ahead(self, source: Any) -> InterleavedSource | PrefetchedSource:
        """Return the source in the form that computes chunks ahead on the language model's device."""
        if self.lm.device.type == "cuda":
            return InterleavedSource(source, self.lm.device)
        return PrefetchedSource(source, 0, self.lm.device)

    def held_out_rows(self, n_tokens: int) -> Int[Tensor, "n t"]:
        """Return the first held-out text rows, n_tokens in all, but at least one row and at most one pass.

        They are shuffled, always in the same way, so that consecutive rows come from different documents.
        """
        with self.lm_lock:
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
            with self.lm_lock:
                self.text.prepare()  # here, because later the bar of the training is on the screen

    def train_dataloader(self) -> Batches:
        return Batches(self.stream, self.n_tokens)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation_batches, batch_size=None)  # type: ignore[arg-type]

    @cached_property
    def validation_batches(self) -> Sequence[Float[Tensor, "b s d"]]:
        """Batches of held-out activations for the validation during training; this rank's share."""
        chunks = self.held_out_rows(self.n_val_tokens).split(self.lm_batch_rows)
        with self.lm_lock:
            rows = torch.cat([self.kept_activations(tokens) for tokens in chunks])
        return rows.tensor_split(world_size())[rank()].split(self.batch_size)

    def calibration_batches(self, n: int) -> Iterator[Float[Tensor, "b s d"]]:
        """Yield the first n training batches again, or as many as the run has."""
        stream = self.new_stream()
        for _ in range(min(n, self.n_steps)):
            batch = next(stream, None)
            if batch is None:
                return
            yield batch

    def teardown(self, stage: str) -> None:
        self.stream.close()

    def on_exception(self, exception: BaseException) -> None:
        self.stream.close()

    @cached_property
    def source_digests(self) -> dict[str, str]:
        """Digests of what determines the batches besides the config; they must be the same when a run resumes."""
        assert isinstance(self.text, TrainingText)
        with self.lm_lock:
            digest = self.text.identity()
            of_text = {"the text": digest} if digest else {"the first rows of the text": self._first_rows_digest(32)}
            of_readers = self.text.reader_digests()
        return {"the language model's weights": weights_digest(self.lm.model), **of_readers, **of_text}

    def _first_rows_digest(self, n: int) -> str:
        return digest_of_rows(self.text.first_rows(n))

    def state_dict(self) -> dict[str, Any]:
        limits = {} if self.max_norm is None else {"norm_limits": self.norm_limits}
        return self.stream.state_dict() | {"origin": self.source_digests} | limits

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream; raise a UserError if the text, the tokenizer or the language model changed."""
        state = dict(state_dict)
        remedy = "restore what it began with, or start over with resume=never."
        origin, here = state.pop("origin", {}), self.source_digests
        if "the text" in origin and "the text" not in here:  # before lm_batch_tokens, by the rows of a pass
            here = here | {"the text": self._first_rows_digest(self.fixed_rows)}
        check_unchanged(origin, here, remedy)
        if self.max_norm is not None:
            self.norm_limits.update(state.pop("norm_limits", {}))
        self.stream.load_state_dict(state)
