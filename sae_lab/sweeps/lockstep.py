"""Train several runs on one stream: each Trainer runs in a greenlet that pauses when it asks for a batch."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.buffer import Filling, ShuffledBlocks
from sae_lab.activations.columns import Columns
from sae_lab.activations.stream import StreamData
from sae_lab.activations.text_batches import TextBatch, TextBatches
from sae_lab.runtime.errors import SafeStop
from sae_lab.runtime.plain_text import plural
from sae_lab.runtime.signals import deferred_signals
from sae_lab.sweeps.failures import failure_recorded
from sae_lab.sweeps.member_logs import MEMBER
from sae_lab.training.run import Member, fit


class SharedStream:
    """A run's part of a stream that several runs share: a run that asks for a batch waits until all have asked.

    Args:
        stream: the stream of activations at the sites of all runs.
        columns: selects the sites of this run.
    """

    def __init__(self, stream: ShuffledBlocks | TextBatches, columns: Columns):
        self.stream, self.columns, self.batch_size = stream, columns, stream.batch_size

    @property
    def n_batches(self) -> int:
        return self.stream.n_batches

    @property
    def n_batches_given(self) -> int:
        return self.stream.n_batches_given

    @property
    def n_rows_left(self) -> int:
        return self.stream.n_rows_left

    @property
    def filling(self) -> Filling:
        return self.stream.filling

    def close(self) -> None:
        """Do nothing: the stream must outlive the first Trainer that ends."""

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.stream.state_dict():  # skipped if the stream is in that state already, with its block filled
            self.stream.load_state_dict(state)

    def __iter__(self) -> "SharedStream":
        return self

    def __next__(self) -> Float[Tensor, "b s d"] | TextBatch:
        batch = getcurrent().parent.switch()
        if batch is None:
            raise StopIteration
        return batch.at(self.columns) if isinstance(batch, TextBatch) else self.columns(batch)


class SharedBatches(Sequence):
    """A run's part of the validation batches that several runs share; computed when the first run needs them."""

    def __init__(self, data: StreamData, columns: Columns):
        self.data, self.columns = data, columns

    def __len__(self) -> int:
        return len(self.data.validation_batches)

    def __getitem__(self, i: int) -> Float[Tensor, "b s d"]:  # type: ignore[override]
        return self.columns(self.data.validation_batches[i])


def share(member: Member, data: StreamData) -> None:
    """Let a member read its sites from the stream and the validation batches of `data`, and save the state of both."""
    columns = Columns(data.sites, member.data.sites)
    member.data.stream = SharedStream(data.stream, columns)
    member.data.validation_batches = SharedBatches(data, columns)
    member.data.share_state(data)


def train_in_lockstep(members: list[Member], data: StreamData) -> None:
    """Call `fit` for all members on the same batches. A member that fails drops out, and the others go on.

    Args:
        members: sorted by the step from which they resume. A member joins when the stream reaches its step.
        data: the data at the sites of all members.

    Raises:
        SafeStop: a signal arrived, and all members that had joined saved a checkpoint at the same step.
    """
    try:
        with deferred_signals():
            data.setup("fit")
            for member in members:
                share(member, data)
            take_turns(members, data.stream)
    except SafeStop as stop:
        raise stop_of_all(members, data, stop) from None
    finally:
        data.stream.close()


def stop_of_all(members: list[Member], data: StreamData, stop: SafeStop) -> SafeStop:
    """Return the exception that says at which step of the stream the members have stopped, and how many are saved."""
    n_saved = sum(member.run.last_checkpoint.exists() for member in members)
    saved = f", {plural(n_saved, 'SAE')} saved" if n_saved else ""
    return SafeStop(f"{stop} at step {data.stream.n_batches_given} of {data.n_steps}{saved}", stop.signum)


def take_turns(members: list[Member], stream: ShuffledBlocks | TextBatches) -> None:
    """Run the members in greenlets until all have ended. A stop comes where all wait for a batch: each saves then."""
    waiting, alive = list(members), list[greenlet]()
    while waiting or alive:
        if waiting and (not alive or waiting[0].run.step <= stream.n_batches_given):
            alive.append(greenlet(partial(fit_member, waiting.pop(0))))
            alive[-1].switch()  # runs until it asks for its first batch
        else:
            try:
                batch = next(stream, None)
            except SafeStop as stop:
                save_all(alive, stop)
                raise
            for run in alive:
                run.switch(batch)
        alive = [run for run in alive if not run.dead]


def save_all(alive: list[greenlet], stop: SafeStop) -> None:
    """Raise `stop` in members that wait for a batch. Each of them saves a checkpoint and raises it again."""
    for run in alive:
        with suppress(SafeStop):
            run.throw(stop)


def fit_member(member: Member) -> None:
    """Call `fit` for one member inside its greenlet, and record its failure."""
    MEMBER.set(member.run.folder)  # a greenlet has its own context variables
    with failure_recorded(member.run.folder):
        fit(member)
