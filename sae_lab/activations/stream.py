"""Shuffled batches of activations as a LightningDataModule that can resume, wherever the rows come from."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from sae_lab.activations.buffer import Prepare, ShuffledBlocks, no_prefetch
from sae_lab.activations.digests import check_unchanged
from sae_lab.activations.held_out import HeldOut
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import SharedSource, Source
from sae_lab.parallel.mesh import data_axis
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.memory import check_memory_of


class Batches:
    """Iterable for Lightning over all batches of a stream; the last one may be smaller.

    With several processes, the stream gives each its share of every batch. The length is defined because Lightning
    otherwise reads one batch ahead.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.n_batches

    def __iter__(self) -> Iterator[Any]:
        while self.stream.n_batches_given < len(self) and (batch := next(self.stream, None)) is not None:
            yield batch


class StreamData(L.LightningDataModule, ABC):
    """Batches `(b, s, d)` of activations, shuffled, deterministic in (config, seed).

    A subclass says where the rows come from, one after the other (`source`), and which are held out. It calls `begin`
    as soon as it knows them.

    Args:
        device: device of the activations.
        batch_size: activations per training batch.
        n_tokens: exact number of activations to train on; the last batch may be smaller.
        block_tokens: activations that are shuffled together, at most those of the run. A block takes
            block_tokens · s · d · bytes of `dtype`, twice that with prefetch. Of n ranks, each holds 1/n of it.
        prefetch: compute the next block during training: on a GPU between the steps, on a CPU in a thread. Does not
            change any row. "auto" is true on a GPU.
        repeat: start a new pass over the data if they end before n_tokens; otherwise the run ends there.
        n_eval_tokens: held-out activations of the evaluation after training.
        n_val_tokens: held-out activations of the validation during training.
        seed: seed of the shuffling of activations.

    Raises:
        SettingError: there are fewer activations than one batch, or a block exceeds the memory.
    """

    name: str
    """Where the activations come from, for the log: a language model, a file."""
    sites: tuple[str, ...]
    """The names of the s sources."""
    d_in: int
    dtype: torch.dtype
    models: tuple[str, ...] = ()
    """The two models, for model diffing."""
    float32_forward_in_thread = False
    """Whether a thread computes float32 products of a language model during training steps."""

    @check_arguments
    def __init__(
        self,
        device: torch.device,
        *,
        batch_size: Annotated[int, Ge(1)],
        n_tokens: Annotated[int, Ge(1)],
        block_tokens: Annotated[int, Ge(1)],
        prefetch: bool | Literal["auto"],
        repeat: bool,
        n_eval_tokens: Annotated[int, Ge(1)],
        n_val_tokens: Annotated[int, Ge(1)],
        seed: Annotated[int, Ge(0)],
    ):
        super().__init__()
        if n_tokens < batch_size:
            raise SettingError(
                f"{{n_tokens}}={n_tokens} is less than one batch of {{batch_size}}={batch_size}: raise {{n_tokens}}."
            )
        self.device, self.seed, self.repeat = device, seed, repeat
        self.batch_size, self.n_tokens = batch_size, n_tokens
        # Activations after the run's last batch are never used, so a short run does not wait for a full block.
        self.block_tokens = min(block_tokens, math.ceil(n_tokens / batch_size) * batch_size)
        self.n_eval_tokens, self.n_val_tokens = n_eval_tokens, n_val_tokens
        self.prefetch = prefetch is True or (prefetch == "auto" and device.type == "cuda")

    def in_whole_rows(self) -> "StreamData":
        """Return the same data in training batches of whole text rows (TextBatch), from the beginning of the stream.

        Raises:
            UserError: the data have no text rows.
        """
        raise UserError(
            f"{self.name} gives activations in no order of a text, which loss=kl_mse needs: choose data of text, such "
            "as data=text_files, or leave loss out."
        )

    def begin(self) -> None:
        """Start the stream, from the beginning."""
        check_memory_of(
            self.device,
            self.block_bytes,
            "a block takes {size}: lower {block_tokens}, or {batch_size} if that is larger.",
        )
        self.stream: Any = self.new_stream(self.prefetch, self.n_tokens)

    def with_sites(self, sites: Sequence[str]) -> "StreamData":
        """Return the same data at the same sites, from the beginning of the stream. A subclass may know other sites."""
        assert tuple(sites) == self.sites
        other = copy(self)
        other.__dict__.pop("validation_batches", None)
        other.begin()
        return other

    def with_joined_sites(self, sites: Sequence[str]) -> "StreamData":
        """Return the same data at all sites of several such data, read together as they are."""
        return self.with_sites(sites)

    def with_previous(self) -> "StreamData":
        """Return the same data with training batches (b, 2·s, d): each row, then that of the token before it.

        Tokens without one in their document are left out. Everything held out stays (b, s, d).

        Raises:
            UserError: the rows are not in the order of a text.
        """
        raise UserError(
            f"{self.name} does not tell which row comes before another, which this SAE compares it with: "
            "give data that a language model computes from text, such as data=stdlib."
        )

    def shares_rows_with(self, other: "StreamData") -> bool:
        """Return whether one pass gives the rows of both, at sites that may differ."""
        return True

    @property
    def n_sources(self) -> int:
        return len(self.sites)

    @property
    def bytes_per_token(self) -> int:
        return self.n_sources * self.d_in * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Memory of this rank's part of one block of activations at all sites."""
        return max(self.block_tokens, self.batch_size) * self.bytes_per_token // data_axis().size

    @property
    def n_steps(self) -> int:
        return self.stream.n_batches

    @abstractmethod
    def source(self) -> Source:
        """Return the training activations before shuffling, from the beginning."""

    @abstractmethod
    def read_ahead(self, source: Any) -> InterleavedSource | PrefetchedSource:
        """Return the source in the form that computes chunks ahead."""

    @abstractmethod
    def held_out(self, n_tokens: int) -> HeldOut:
        """Return the first held-out data, n_tokens in all, in parts of about a batch; always the same ones."""

    @abstractmethod
    def probe_rows(self, n: int = 16) -> Float[Tensor, "n s d"]:
        """Return n held-out activations, on which a saved SAE is verified."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Return `model` (name, revision), `sites`, `tokenizer` and `bos` for the provenance of an SAE.

        `reading`, if there is one, is how documents that are no plain text became ids (see TextSource).
        """

    @cached_property
    @abstractmethod
    def source_digests(self) -> dict[str, str]:
        """Digests of what determines the batches besides the config; they must be the same when a run resumes."""

    def new_stream(self, prefetch: bool = False, n_rows: int | None = None) -> ShuffledBlocks:
        """Return the stream of shuffled training batches, from the beginning; n_rows: those that will be taken."""
        source = ahead = self.source()
        prepare: Prepare = no_prefetch
        if prefetch:
            ahead = self.read_ahead(source)
            prepare = ahead.prepare
        shared = SharedSource(self.keep_short(ahead))
        return ShuffledBlocks(shared, self.block_tokens, self.batch_size, self.seed, n_rows, prepare, self.device)

    def keep_short(self, source: Source) -> Source:
        """Return the source without rows that are too long. Here none is, whatever its norm."""
        return source

    def train_dataloader(self) -> Batches:
        return Batches(self.stream)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation_batches, batch_size=None)  # type: ignore[arg-type]

    @cached_property
    def validation_batches(self) -> Sequence[Float[Tensor, "b s d"]]:
        """Batches of held-out activations for the validation during training; this rank's share."""
        return self.validation_rows().tensor_split(data_axis().size)[data_axis().index].split(self.batch_size)

    def validation_rows(self) -> Float[Tensor, "n s d"]:
        held_out = self.held_out(self.n_val_tokens)
        return torch.cat([held_out.read(part).x for part in held_out.parts])

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

    def share_state(self, data: "StreamData") -> None:
        """Take what a checkpoint holds besides the place in the stream from `data` of the same origin."""
        self.source_digests = data.source_digests

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() | {"origin": self.source_digests}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stream; raise a UserError if what the rows come from changed."""
        state = dict(state_dict)
        self.check_began_with(state.pop("origin", {}))
        self.stream.load_state_dict(state)

    def check_began_with(self, origin: dict[str, str]) -> None:
        """Raise a UserError if the rows do not come from what a run began with, whose `source_digests` these are."""
        check_unchanged(
            origin, self.digests_like(origin), "restore what it began with, or start over with resume=never."
        )

    def digests_like(self, origin: dict[str, str]) -> dict[str, str]:
        """Return the digests to compare with those that a run began with."""
        return self.source_digests
