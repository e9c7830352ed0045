"""Shuffled batches of activations as a LightningDataModule that can resume, wherever the rows come from."""

import math
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
from typing_extensions import Self

from sae_lab.activations.buffer import Prepare, ShuffledBlocks, no_prefetch
from sae_lab.activations.contract import ActivationRows
from sae_lab.activations.digests import check_unchanged
from sae_lab.activations.source import SharedSource
from sae_lab.parallel.mesh import data_axis
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError
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


class StreamData(ActivationRows, L.LightningDataModule):  # type: ignore[misc]  # whose name may be None
    """Batches `(b, s, d)` of activations, shuffled, deterministic in (config, seed).

    A subclass says where the rows come from (ActivationRows). It calls `begin` as soon as it knows them.

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

    def begin(self) -> None:
        """Start the stream, from the beginning."""
        check_memory_of(
            self.device,
            self.block_bytes,
            "a block takes {size}: lower {block_tokens}, or {batch_size} if that is larger.",
        )
        self.stream: Any = self.new_stream(self.prefetch, self.n_tokens)

    def with_sites(self, sites: Sequence[str]) -> Self:
        """Return the same data at the same sites, from the beginning of the stream. A subclass may know other sites."""
        assert tuple(sites) == self.sites
        other = copy(self)
        other.__dict__.pop("validation_batches", None)
        other.begin()
        return other

    def with_joined_sites(self, sites: Sequence[str]) -> Self:
        """Return the same data at all sites of several such data, read together as they are."""
        return self.with_sites(sites)

    @property
    def block_bytes(self) -> int:
        """Memory of this rank's part of one block of activations at all sites."""
        return max(self.block_tokens, self.batch_size) * self.bytes_per_token // data_axis().size

    @property
    def n_steps(self) -> int:
        return self.stream.n_batches

    def new_stream(self, prefetch: bool = False, n_rows: int | None = None) -> ShuffledBlocks:
        """Return the stream of shuffled training batches, from the beginning; n_rows: those that will be taken."""
        source = ahead = self.source()
        prepare: Prepare = no_prefetch
        if prefetch:
            ahead = self.read_ahead(source)
            prepare = ahead.prepare
        shared = SharedSource(self.keep_short(ahead))
        return ShuffledBlocks(shared, self.block_tokens, self.batch_size, self.seed, n_rows, prepare, self.device)

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

    def share_state(self, data: Self) -> None:
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
        remedy = "restore what it began with, or start over with resume=never."
        check_unchanged(origin, self.digests_like(origin), remedy)
