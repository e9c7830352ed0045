"""Shards behind a URL: copied to this machine, within a limit, or read piece by piece."""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from sae_lab.cache.store import Store
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.user_cache import user_cache

FOLDER = "shards"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""The dtypes of a shard's tensors, by their names in safetensors."""
LARGEST_HEADER = 1_000_000
"""Largest header of a file that is read, in bytes. That of a shard of 100 sites has 60,000."""


def local_copy(store: Store, file: str, size: int, checksum: str, limit: int) -> Path:
    """Return the path of a copy of a remote file in `user_cache()`, which is made at the first call.

    All copies together take at most `limit` bytes: the one that was opened longest ago is removed first. (Processes
    that have it mapped keep it.)

    Raises:
        ValueError: the file has another checksum.
    """
    name = xxhash.xxh3_128_hexdigest(f"{store.url} {file} {checksum}".encode())
    copy = user_cache() / FOLDER / name
    if not copy.exists():
        content = store.read(file)
        if xxhash.xxh3_128_hexdigest(content) != checksum:
            raise ValueError("its digest differs")
        make_room(copy.parent, limit - size)
        write_atomically(copy, content)
    copy.touch()
    return copy


def make_room(folder: Path, limit: int) -> None:
    """Remove the oldest files of a folder until all together take at most `limit` bytes."""
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*"))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total > limit:
            path.unlink(missing_ok=True)
            total -= size


class RemoteTensor(NamedTuple):
    """A tensor of a remote safetensors file. A slice of its first axis is read when it is asked for."""

    store: Store
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""

    def numel(self) -> int:
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Tensor:  # type: ignore[override]
        """Return the slice; raise a ValueError if the file ends before."""
        start, stop, _ = part.indices(self.shape[0])
        size = self.dtype.itemsize * prod(self.shape[1:])
        content = self.store.read_range(self.file, self.begin + start * size, self.begin + stop * size)
        if len(content) != (stop - start) * size:
            raise ValueError("the file is too short")
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(stop - start, *self.shape[1:])


def open_remote(store: Store, file: str) -> dict[str, Tensor]:
    """Return the tensors of a remote shard: those of rows as RemoteTensor, which is sliced like one; all others whole.

    Raises:
        ValueError, KeyError, TypeError: the file is no shard.
    """
    n_header = int.from_bytes(store.read_range(file, 0, 8), "little")
    if not 0 < n_header <= LARGEST_HEADER:
        raise ValueError("its header is too large")
    header = json.loads(store.read_range(file, 8, 8 + n_header))
    tensors = dict[str, Tensor]()
    for name, entry in header.items():
        if name != "__metadata__":
            begin = 8 + n_header + entry["data_offsets"][0]
            tensor = RemoteTensor(store, file, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
            of_rows = name.startswith(("activations", "scales"))
            tensors[name] = tensor if of_rows else tensor[: len(tensor)]  # type: ignore[assignment]
    return tensors
