"""Checkpoints of runs whose latents are sharded over ranks: the file `last.ckpt`, and a folder with a file per shard.

The ranks that hold the shards write side by side, through torch.distributed.checkpoint, into a new folder beside the
file: `last.shards-<step>/shard-00001-...safetensors`. Then rank 0 replaces `last.ckpt`. It holds everything else, in
place of each sharded tensor a meta tensor of the shape of the whole, and under `shards` the name of the folder with the
size and the digest of each of its files. Last, the folder before is removed. So a run that is killed at any moment has
one whole checkpoint, and the digest of `last.ckpt` covers the shards.

Any number of shards can resume a checkpoint of any other number, and of none: each rank reads its own latents only. The
files are safetensors, because torch's own format for them holds a pickle, which may run code.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lab.parallel.mesh import latent_axis
from sae_lab.parallel.shards import gather_over_shards
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_file
from sae_lab.runtime.os_errors import reason_of
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.weights import with_latents

# torch.distributed.checkpoint is imported where it is used: the import takes a second.

SHARDS = "shards"
"""Key of a checkpoint. Before it is written: the sharded tensors by name. In the file: the name of their folder and its
files. Once it is loaded: the path of the folder instead of its name."""


class Place(NamedTuple):
    """Where a checkpoint has a tensor with an axis of latents, and the name of this tensor in the files of shards."""

    container: dict[Any, Any]
    key: Any
    name: str
    axis: int


def places(checkpoint: Mapping[str, Any], sae: BaseSAE, n: int) -> Iterator[Place]:
    """Yield the tensors of a Lightning checkpoint that have an axis of latents.

    Args:
        n: size of this axis. An optimizer's state has it where its parameter has one, unless it is of another shape,
            such as a count of steps.
    """
    axes, parameters = sae.latent_axes(), [name for name, _ in sae.named_parameters()]
    for name, axis in axes.items():
        if f"sae.{name}" in checkpoint["state_dict"]:
            yield Place(checkpoint["state_dict"], f"sae.{name}", name, axis)
    for i, optimizer in enumerate(checkpoint["optimizer_states"]):
        for j, state in optimizer["state"].items():
            axis = axes.get(name := parameters[j], -1)
            for key, tensor in state.items():
                if isinstance(tensor, Tensor) and 0 <= axis < tensor.ndim and tensor.shape[axis] == n:
                    yield Place(state, key, f"optimizer_{i}.{name}.{key}", axis)


def move_to_shards(checkpoint: dict[str, Any], sae: BaseSAE) -> None:
    """Move the tensors with an axis of latents out of a checkpoint, in place, for `write_shards`.

    Does nothing if the latents are not sharded.
    """
    if len(sae.own_latents) == sae.n_latents:
        return
    moved = {}
    for optimizer in checkpoint["optimizer_states"]:  # the inner dictionaries are the optimizer's own
        optimizer["state"] = {i: dict(state) for i, state in optimizer["state"].items()}
    for container, key, name, axis in list(places(checkpoint, sae, len(sae.own_latents))):
        tensor = container[key]
        shape = with_latents(tensor.shape, axis, sae.n_latents)
        moved[name] = as_shard(tensor.detach(), axis, shape)
        container[key] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    checkpoint[SHARDS] = moved


def as_shard(tensor: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Return the DTensor of which this rank has `tensor`; the tensor itself if the latents are not sharded."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    if (group := latent_axis().group) is None:
        return tensor
    mesh, stride = DeviceMesh.from_group(group, tensor.device.type), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor.contiguous(), mesh, [Shard(axis)], run_check=False, shape=shape, stride=stride)


def write_shards(tensors: dict[str, Tensor], checkpoint: Path, step: int) -> dict[str, Any]:
    """Write this rank's shard beside the others; to be called by all ranks of a row of the mesh.

    Args:
        tensors: what `move_to_shards` moved.
        checkpoint: the file that will name them.
        step: names the folder.

    Returns:
        What the file holds under `shards`.

    Raises:
        UserError: a rank could not write.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    axis = latent_axis()
    folder = gather_over_shards(new_folder(checkpoint, step))[0]
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, process_group=axis.group)
    except CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise UserError(f"{folder} cannot be written: {reason_of(error)}") from e  # type: ignore[arg-type]
    [own] = folder.glob(f"shard-{axis.index + 1:05d}-*")
    files = gather_over_shards((own.name, [own.stat().st_size, digest_of_file(own)]))
    return {"folder": folder.name, "files": dict(files)}


def folder_name(checkpoint: Path) -> str:
    """Return what the names of a checkpoint's folders begin with."""
    return f"{checkpoint.stem}.{SHARDS}-"


def new_folder(checkpoint: Path, step: int) -> Path:
    """Return a folder for shards that does not exist: one of the same step may be in use."""
    folder, again = checkpoint.with_name(f"{folder_name(checkpoint)}{step}"), 1
    while folder.exists():
        again += 1
        folder = checkpoint.with_name(f"{folder_name(checkpoint)}{step}-{again}")
    return folder


def remove_shards(checkpoint: Path, but: str | None) -> None:
    """Remove the folders of a checkpoint's shards, but for the one that it names."""
    for folder in checkpoint.parent.glob(f"*.{SHARDS}-*"):
        if folder.name.startswith(folder_name(checkpoint)) and folder.name != but:
            shutil.rmtree(folder)


def check_shards(checkpoint: Path, content: Mapping[str, Any]) -> None:
    """Compare the files that a checkpoint names with those that are there, by their names and sizes.

    Raises:
        ValueError: a shard is missing, cut off, or not of this checkpoint.
    """
    if SHARDS not in content:
        return
    name, files = content[SHARDS]["folder"], content[SHARDS]["files"]
    if not name.startswith(folder_name(checkpoint)) or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is no folder of its shards")
    there = {file.name: file.stat().st_size for file in checkpoint.with_name(name).glob("*.safetensors")}
    named = {file: size for file, (size, _) in files.items()}
    if wrong := sorted(file for file in there.keys() | named.keys() if there.get(file) != named.get(file)):
        file = wrong[0]
        here, expected = (f"{sizes[file]} bytes" if file in sizes else "missing" for sizes in (there, named))
        raise ValueError(f"{name}/{file} is {here}, expected {expected}")


def take_own_latents(checkpoint: dict[str, Any], sae: BaseSAE) -> None:
    """Put this rank's part of the tensors with an axis of latents into a checkpoint that was loaded, in place.

    Raises:
        UserError: a shard has changed since it was written, or is not of this checkpoint.
    """
    shards, own, n = checkpoint.pop(SHARDS, None), sae.own_latents, sae.n_latents
    if shards is None and len(own) == n:
        return
    missing = {}
    for container, key, name, axis in list(places(checkpoint, sae, n)):
        whole = container[key]
        if whole.is_meta:
            container[key] = torch.empty(with_latents(whole.shape, axis, len(own)), dtype=whole.dtype)
            missing[name] = as_shard(container[key], axis, whole.shape)
        else:
            container[key] = whole.narrow(axis, own.start, len(own)).clone()
    if missing:
        check_digests(Path(shards["folder"]), shards["files"], own, n)
        read_shards(missing, Path(shards["folder"]))


def check_digests(folder: Path, files: Mapping[str, Any], own: range, n: int) -> None:
    """Compare the files that hold latents of `own`, of n latents in equal shares, with their digests."""
    for i, name in enumerate(sorted(files)):
        start, end = (n * j // len(files) for j in (i, i + 1))
        if start < own.stop and own.start < end and digest_of_file(folder / name) != files[name][1]:
            raise UserError(
                f"{folder / name} changed since the run wrote it: restore it, or type resume=never to train again."
            )


def read_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, each whole or this rank's shard of it, from a folder of `write_shards`."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:  # no_dist: each rank reads by itself
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise UserError(f"the shards in {folder} cannot be read: {reason_of(error)}") from e  # type: ignore[arg-type]
