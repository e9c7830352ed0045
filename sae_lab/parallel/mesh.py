"""The processes that train one SAE, as a mesh of data x latents.

Ranks of one row of the mesh hold the same share of every batch and different latents, those of one column the same
latents and different shares. Rank r is in row r // m and column r % m for m shards of the latents, so that those of a
row are neighbours. Without shards, all ranks are one column.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sae_lab.parallel.environment import own_gpu
from sae_lab.parallel.parts import active_part
from sae_lab.runtime.errors import SettingError, UserError


def world_size() -> int:
    """Return the number of processes that train one SAE."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process. Rank 0 writes the run's files."""
    return dist.get_rank() if world_size() > 1 else 0


@dataclass(frozen=True)
class Axis:
    """This process's place among the ranks of its row or column."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    """The ranks that communicate along the axis; None: all."""

    def share(self, n: int) -> slice:
        """Return this rank's part of n items, in equal consecutive shares. The last n mod size items are in none."""
        size = n // self.size
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True)
class Slice(Axis):
    """The axis of latents of a process that holds some, where no other process holds the rest."""

    own: range = range(0)

    def share(self, n: int) -> slice:
        own = self.own
        if own.step != 1 or not 0 <= own.start < own.stop <= n:
            raise UserError(f"latents={own} is no part of {n} latents: give such as range(0, {min(n, 1024)}).")
        return slice(own.start, own.stop)


_axes: tuple[Axis, Axis] | None = None


def data_axis() -> Axis:
    """Return the axis along which ranks hold different rows of a batch.

    While a part of a batch runs (see parts.py), it is the axis of all parts of all ranks, in the order of their rows.
    """
    axis, part = rank_axis(), active_part()
    if part is None:
        return axis
    return Axis(axis.size * part.n_parts, axis.index * part.n_parts + part.index, axis.group)


def rank_axis() -> Axis:
    """Return `data_axis()` of whole batches: that of processes alone."""
    return Axis(world_size(), rank()) if _axes is None else _axes[0]


def latent_axis() -> Axis:
    """Return the axis along which ranks hold different latents."""
    return Axis() if _axes is None else _axes[1]


def mesh_size() -> int:
    """Return the number of ranks that work on one batch: those with other rows times those with other latents."""
    return data_axis().size * latent_axis().size


@contextmanager
def placed_on(data: Axis, latents: Axis) -> Iterator[None]:
    """Let this process have these places on both axes, inside the block."""
    global _axes
    before, _axes = _axes, (data, latents)
    try:
        yield
    finally:
        _axes = before


@contextmanager
def first_share() -> Iterator[bool]:
    """Let the ranks that hold the first share of each batch work without the others, inside the block.

    Each of them then holds whole batches, as after training, when one process, or one per shard, does what is left.
    Yields whether this rank is one of them; the others wait for nothing inside the block.
    """
    first = data_axis().index == 0
    with placed_on(Axis(), latent_axis()):
        yield first


@contextmanager
def sharded_latents(m: int) -> Iterator[None]:
    """Arrange all processes as a mesh with m shards of the latents, inside the block.

    Raises:
        SettingError: m does not divide the number of processes.
    """
    if m == 1:
        yield
        return
    n = world_size()
    if n % m:
        raise SettingError(f"{{shard_latents}}={m} must divide the number of processes, which is {n}.")
    device = "cpu" if own_gpu() is None else "cuda"
    mesh = init_device_mesh(device, (n // m, m), mesh_dim_names=("data", "latents"))
    data, latents = (
        Axis(mesh.size(i), mesh.get_local_rank(name), mesh.get_group(name))
        for i, name in enumerate(("data", "latents"))
    )
    with placed_on(data, latents):
        yield


@contextmanager
def only_latents(own: range) -> Iterator[None]:
    """Let SAEs that are built inside the block hold these latents alone."""
    with placed_on(data_axis(), Slice(own=own)):
        yield
