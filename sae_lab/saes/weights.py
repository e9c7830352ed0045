"""The tensors of an SAE folder: in `sae.safetensors`, or in one file per shard of the latents that an index names.

A sharded SAE is saved as `sae-00001-of-00008.safetensors` ... and `sae.safetensors.index.json`, the index that Hugging
Face's libraries write: `weight_map` maps each key to its file, `metadata.total_size` is the sum of bytes. A tensor with
an axis of latents has one key per file, which says where the file's part belongs, as NumPy writes it:
`W_dec[16384:32768]`, or `W[:, 0:64]` along the second axis. So all keys differ, every reader of such an index finds
all numbers, and no field of our own is needed. Tensors without an axis of latents are in the first file.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from sae_lab.runtime.files import read_json
from sae_lab.saes.base import BaseSAE

WEIGHTS, INDEX = "sae.safetensors", "sae.safetensors.index.json"
AT_ONCE = 2**24
"""Bytes of a tensor that are copied at a time, since safetensors copies what it reads."""
SHARD = re.compile(r"sae-\d{5}-of-\d{5}\.safetensors")
KEY = re.compile(r"(?P<name>.+)\[(?P<before>(:, )*)(?P<start>\d+):(?P<stop>\d+)\]")


class Part(NamedTuple):
    """Some latents of a tensor, in a file.

    Args:
        shape: of what the file has.
        axis, start: which latents these are. Without an index, every tensor is one part with axis 0 and start 0.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    axis: int
    start: int


def shard_name(i: int, n: int) -> str:
    """Return the name of the i-th (from 0) of n files."""
    return f"sae-{i + 1:05d}-of-{n:05d}.safetensors"


def key_of(name: str, axis: int | None, own: range) -> str:
    """Return the key of some latents of a tensor."""
    return name if axis is None else f"{name}[{':, ' * axis}{own.start}:{own.stop}]"


def index_of(files: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the content of the index of files, given the bytes of each of their tensors."""
    sizes = [size for tensors in files.values() for size in tensors.values()]
    return {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {key: file for file, tensors in files.items() for key in tensors},
    }


def holds_weights(folder: Path) -> bool:
    """Return whether a folder has the tensors of an SAE of ours."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files with an SAE's tensors: one, or the index and the files that it names.

    Raises:
        OSError, ValueError: the index cannot be read, or names anything but files of a folder of ours.
    """
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(SHARD.fullmatch(str(file)) for file in named.values()):
        raise ValueError(f"{INDEX} does not map tensors to files such as {shard_name(0, 2)}")
    return [INDEX, *sorted(set(named.values()))]


def read_parts(folder: Path) -> dict[str, list[Part]]:
    """Return the parts of each tensor, in the order of its latents. Reads headers only.

    Raises:
        ValueError: the index does not fit the files, or the parts of a tensor overlap or leave latents out.
    """
    index, *shards = weight_files(folder)
    if not shards:
        return {part.key: [part] for part in parts_in(folder / WEIGHTS)}
    if lost := [file for file in shards if not (folder / file).is_file()]:
        raise ValueError(f"{lost[0]} is missing, which {index} names")
    found = [part for file in shards for part in parts_in(folder / file)]
    in_files, in_index = {part.key: part.file.name for part in found}, read_json(folder / INDEX)["weight_map"]
    if wrong := sorted(key for key in in_files.keys() | in_index.keys() if in_files.get(key) != in_index.get(key)):
        here, there = (files.get(wrong[0], "no file") for files in (in_files, in_index))
        raise ValueError(f"{wrong[0]} is in {here}, but {index} says {there}")
    if len(found) > len(in_files):
        raise ValueError("two files have a tensor of the same key: they are of different SAEs")
    tensors: dict[str, list[Part]] = {}
    for part in sorted(found, key=lambda part: part.start):
        match = KEY.fullmatch(part.key)
        tensors.setdefault(match["name"] if match else part.key, []).append(part)
    for name, parts in tensors.items():
        check_complete(name, parts)
    return tensors


def parts_in(file: Path) -> Iterator[Part]:
    """Yield the parts that a file has.

    Raises:
        ValueError: the key of one says another number of latents than its shape.
    """
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            shape = tuple(tensors.get_slice(key).get_shape())
            match = KEY.fullmatch(key)
            axis, start = (len(match["before"]) // 3, int(match["start"])) if match else (0, 0)
            if match and (axis >= len(shape) or shape[axis] != int(match["stop"]) - start):
                raise ValueError(f"{key} of {file.name} has the shape {shape}")
            yield Part(file, key, shape, axis, start)


def check_complete(name: str, parts: list[Part]) -> None:
    """Raise a ValueError unless each part begins where the one before ends, and all are alike but for that."""
    end = 0
    for part in parts:
        if part.start != end:
            what = "overlap" if part.start < end else "leave latents out"
            raise ValueError(f"the parts of {name} {what} at {min(part.start, end)} ({part.file.name})")
        end += part.shape[part.axis] if part.shape else 0
    if len({(part.axis, part.shape[: part.axis], part.shape[part.axis + 1 :]) for part in parts}) > 1:
        raise ValueError(f"the parts of {name} have different shapes: they are of different SAEs")


def shape_of(parts: list[Part]) -> tuple[int, ...]:
    """Return the shape of a whole tensor."""
    first, axis = parts[0].shape, parts[0].axis
    return (*first[:axis], sum(part.shape[axis] for part in parts), *first[axis + 1 :]) if first else ()


def with_latents(shape: tuple[int, ...], axis: int | None, n: int) -> torch.Size:
    """Return a shape with n latents along `axis`; the shape itself if there is no such axis."""
    return torch.Size(shape if axis is None else (*shape[:axis], n, *shape[axis + 1 :]))


def whole_shapes(sae: BaseSAE, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shapes that an SAE's parameters and buffers have over all shards, with a prefix before their names."""
    axes, state = sae.latent_axes(), sae.state_dict()
    return {prefix + name: tuple(with_latents(t.shape, axes.get(name), sae.n_latents)) for name, t in state.items()}


@torch.no_grad()
def fill(sae: BaseSAE, tensors: Mapping[str, list[Part]]) -> None:
    """Read an SAE's parameters and buffers into them: of tensors with an axis of latents, those that it holds."""
    axes, own, state = sae.latent_axes(), sae.own_latents, sae.state_dict()
    for name, part in parts_to_read(sae, tensors):
        axis, target = axes.get(name), state[name]
        with safe_open(part.file, "pt") as content:
            if axis is None:
                target.copy_(content.get_tensor(part.key))
                continue
            stored, size = content.get_slice(part.key), max(1, target.nbytes // max(1, len(own)))
            for latents in pieces(overlap(part, axis, own), max(1, AT_ONCE // size)):
                here = slice(latents.start - part.start, latents.stop - part.start)
                rows = stored[(slice(None),) * axis + (here,)]
                target.narrow(axis, latents.start - own.start, len(latents)).copy_(rows)


def pieces(latents: range, size: int) -> Iterator[range]:
    """Yield consecutive pieces of at most `size` latents."""
    for start in range(latents.start, latents.stop, size):
        yield range(start, min(start + size, latents.stop))


def parts_to_read(sae: BaseSAE, tensors: Mapping[str, list[Part]]) -> Iterator[tuple[str, Part]]:
    """Yield the parts that have any of the numbers that an SAE holds, each with the name of its tensor."""
    axes = sae.latent_axes()
    for name in sae.state_dict():
        for part in tensors[name]:
            if name not in axes or overlap(part, axes[name], sae.own_latents):
                yield name, part


def overlap(part: Part, axis: int, own: range) -> range:
    """Return the latents that are both in a part and in `own`."""
    return range(max(part.start, own.start), min(part.start + part.shape[axis], own.stop))


def files_to_check(folder: Path, sae: BaseSAE, tensors: Mapping[str, list[Part]]) -> list[str]:
    """Return the files whose digests tell whether what an SAE reads is unchanged.

    For a slice, the index and the files with any of its numbers. Without an index there are none: the digest of the
    one file would need the rest of it.
    """
    if len(sae.own_latents) == sae.n_latents:
        return weight_files(folder)
    read = {part.file.name for _, part in parts_to_read(sae, tensors)} - {WEIGHTS}
    return [INDEX, *sorted(read)] if read else []
