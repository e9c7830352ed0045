"""Activations in files of anyone: .pt, .safetensors, .npy, or a folder of them, mapped into memory as one tensor."""

import json
import os
import pickle
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from mmap import MAP_SHARED
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor
from torch.serialization import set_default_mmap_options

from sae_lab.runtime.errors import SettingError, UserError, first_line
from sae_lab.text.archives import LFS_POINTER
from sae_lab.text.documents import stamp_of

Axes = Literal["auto", "nd", "nsd", "ntd", "ntsd"]
NDIM = {"nd": 2, "nsd": 3, "ntd": 3, "ntsd": 4}
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The numbers of activations, by their names in .safetensors files; tensors of others are not looked at."""
DTYPES = tuple(SAFETENSORS.values())
PT_BEGINS = (b"PK", b"\x80")
"""How a file of torch.save begins: a zip archive or, before torch 1.6, a pickle."""


IN_MEMORY = Path("the tensor")
"""What stands for a file in messages about a tensor in memory."""


class Part(NamedTuple):
    """A tensor of a file, as rows of s sources."""

    file: Path
    rows: Float[Tensor, "n s d"]


class TensorRows:
    """The rows of several tensors one after the other.

    float64 is converted to float32, and so is everything if tensors differ in dtype.

    Args:
        parts: the tensors.

    Raises:
        SettingError: the tensors do not fit each other.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        check_alike(self.parts)
        self.found = sorted({str(part.rows.dtype).removeprefix("torch.") for part in self.parts})
        self.dtype = torch.float32 if len(self.found) > 1 or self.found == ["float64"] else self.parts[0].rows.dtype
        self._first = [0, *accumulate(len(part.rows) for part in self.parts)]

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def n_sources(self) -> int:
        return self.parts[0].rows.shape[1]

    @property
    def d(self) -> int:
        return self.parts[0].rows.shape[2]

    def locate(self, row: int) -> tuple[Part, int]:
        """Return the part that holds a row, and the number of the row in it."""
        i = bisect_right(self._first, row) - 1
        return self.parts[i], row - self._first[i]

    def views(self, start: int, stop: int) -> Iterator[Float[Tensor, "n s d"]]:
        """Yield the rows from start to stop as views of the files, one for each part that they lie in."""
        while start < stop:
            part, i = self.locate(start)
            yield part.rows[i : i + stop - start]
            start += min(stop - start, len(part.rows) - i)

    def rows(self, ranges: Sequence[range]) -> Float[Tensor, "n s d"]:
        """Return the rows of several ranges one after the other, in memory."""
        return torch.cat([view.to(self.dtype) for r in ranges for view in self.views(r.start, r.stop)])

    def digest(self) -> str:
        """Return a digest that changes when the rows change. A gigabyte in memory takes about a second."""
        digest = xxhash.xxh3_128()
        for part in self.parts:
            rows = part.rows.contiguous()
            digest.update(f"{tuple(rows.shape)} {rows.dtype}".encode())
            digest.update(rows.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def rows_in_memory(x: Tensor, axes: Axes) -> TensorRows:
    """Return the rows of a tensor in memory, on the CPU."""
    if len(x) == 0:
        raise UserError(f"a tensor of shape {tuple(x.shape)} holds no rows: give at least one activation.")
    return TensorRows([Part(IN_MEMORY, as_rows(x.detach().cpu(), axes, IN_MEMORY))])


class TensorFiles(TensorRows):
    """The rows of all files one after the other, in the order of the files' names.

    Files are mapped into memory, so only the rows that are asked for are read.

    Args:
        path: a file or a folder.
        key: which of several tensors in each file to read; names inside of dicts are joined by dots.
        axes: what the axes of the tensors are: n and t are rows, s is sources, d is the width. `auto` knows nd only.

    Raises:
        SettingError: there is no such file or tensor; the tensors hold no activations, or do not fit each other.
    """

    def __init__(self, path: str, key: str | None, axes: Axes):
        self.files = find_files(path)
        parts = [part for file in self.files for part in read_parts(file, key, axes)]
        parts = [part for part in parts if len(part.rows)]
        if not parts:
            raise SettingError(f"{{path}}={literal(path)} holds no rows: give a file with at least one activation.")
        super().__init__(parts)

    def digest(self) -> str:
        return stamp_of(self.files)


def find_files(path: str) -> list[Path]:
    """Return the file, or the files of the folder that have a known ending, in the order of their names."""
    here, known = expanded(path), ", ".join(READERS)
    if here.is_dir():
        found = [f for f in sorted(here.rglob("*")) if f.suffix in READERS and not f.name.startswith(".")]
        if not found:
            raise SettingError(f"{{path}}={literal(path)} is a folder without activations: it must hold {known} files.")
        return found
    if not here.exists():
        raise SettingError(f"{{path}}={literal(path)} does not exist: give a file ({known}) or a folder of such files.")
    if here.suffix not in READERS:
        raise SettingError(f"{{path}}={literal(path)} is none of {known}: save it with torch.save(x, 'acts.pt').")
    return [here]


def expanded(path: str) -> Path:
    """Return a path without `~`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (does not raise for an unknown user)


def read_parts(file: Path, key: str | None, axes: Axes) -> list[Part]:
    """Return the tensors of a file that hold the activations: one, or those of a list."""
    chosen = choose(read_file(file), key, file)
    tensors = [chosen] if isinstance(chosen, Tensor) else chosen
    return [Part(file, as_rows(tensor.detach(), axes, file)) for tensor in tensors]


def read_file(file: Path) -> Any:
    """Return what a file holds.

    Raises:
        UserError: it cannot be read, whatever the reader says of it: readers trip over broken files in many ways.
    """
    try:
        if first_bytes(file).startswith(LFS_POINTER):
            raise UserError(f"{file} is a pointer of Git LFS and not the file: run git lfs pull.")
        return READERS[file.suffix](file)
    except (UserError, MemoryError):
        raise
    except Exception as e:
        raise UserError(f"{file} cannot be read ({first_line(e)}): save it again.") from e


def first_bytes(file: Path) -> bytes:
    with file.open("rb") as f:
        return f.read(len(LFS_POINTER))


def load_pt(file: Path) -> Any:
    """Return what torch.save wrote, mapped into memory; the format of before torch 1.6 is loaded whole."""
    if (begin := first_bytes(file)) and not begin.startswith(PT_BEGINS):
        raise UserError(f"{file} is no .pt file: save the tensor with torch.save(x, 'acts.pt').")
    # A private mapping counts as memory that might be written to, so Linux refuses one that exceeds the memory.
    share = set_default_mmap_options(MAP_SHARED) if os.access(file, os.W_OK) else nullcontext()
    try:
        with share:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except (pickle.UnpicklingError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "TorchScript" not in str(e):
            raise
        raise UserError(
            f"{file} holds more than plain tensors, and opening it could run code of its author: if you trust it, load "
            "it with torch.load(..., weights_only=False) yourself, and save the tensor alone with torch.save."
        ) from e


def load_npy(file: Path) -> Tensor:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    try:
        return read_only(array)
    except (TypeError, ValueError) as e:  # strings, structs, the other byte order, negative strides
        raise UserError(
            f"{file} holds {array.dtype.str} numbers, which torch does not read: save x.astype('float32')."
        ) from e


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors by name. The library's own reader makes a private mapping (see load_pt)."""
    content = read_only(np.memmap(file, np.uint8, "r"))
    start = 8 + int(content[:8].view(torch.int64))
    header = json.loads(bytes(content[8:start].numpy()))
    return {
        name: content[start:][slice(*entry["data_offsets"])].view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in SAFETENSORS
    }


def read_only(array: np.ndarray) -> Tensor:
    """Return the tensor of an array whose memory cannot be written to. Nothing here does, so torch need not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": load_pt,
    ".pth": load_pt,
    ".safetensors": load_safetensors,
    ".npy": load_npy,
}


def literal(file: Path | str) -> str:
    """Return a path for the sentence of a SettingError, in which braces stand for keys."""
    return str(file).replace("{", "{{").replace("}", "}}")


def choose(content: Any, key: str | None, file: Path) -> Tensor | list[Tensor]:
    """Return the only tensor or list of tensors in a file, or the one that the key names."""
    found = dict(named_tensors(content))
    names = ", ".join(list(found)[:8]) + (", ..." if len(found) > 8 else "")
    if not found:
        raise UserError(f"{file} holds no tensor but a {type(content).__name__}: save it with torch.save(x, ...).")
    if key is None and len(found) > 1:
        raise SettingError(f"{literal(file)} holds several tensors ({literal(names)}): choose one with {{key}}=NAME.")
    if key is not None and key not in found:
        raise SettingError(
            f"{{key}}={literal(key)} is not in {literal(file)}: "
            + (f"choose among {literal(names)}." if any(found) else "leave it out.")
        )
    return found[key] if key is not None else next(iter(found.values()))


def is_tensors(content: Any) -> bool:
    """Return whether something is a tensor, or a list of tensors, which are read one after the other."""
    listed = isinstance(content, list | tuple) and len(content) > 0 and all(isinstance(x, Tensor) for x in content)
    return isinstance(content, Tensor) or listed


def named_tensors(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and lists of tensors at any depth of dicts, with their names."""
    if is_tensors(content):
        yield name, content
    elif isinstance(content, Mapping):
        for key, child in content.items():
            yield from named_tensors(child, f"{name}.{key}" if name else str(key))


def as_rows(x: Tensor, axes: Axes, file: Path) -> Float[Tensor, "n s d"]:
    """Return a tensor as rows of sources, as a view.

    Raises:
        SettingError: it cannot be activations, or it is not known what its axes are.
    """
    if x.is_nested:
        raise UserError(f"{file} holds a nested tensor: save its rows one after the other (torch.cat(x.unbind())).")
    if x.is_meta:
        raise UserError(f"{file} holds a tensor of the meta device, which has no numbers: save the activations.")
    shape = tuple(x.shape)
    if x.dtype not in DTYPES or x.layout != torch.strided:
        what = str(x.dtype if x.layout == torch.strided else x.layout).removeprefix("torch.")
        raise UserError(
            f"{file} holds {what} of shape {shape}, no activations: save floating-point numbers (x.float())."
        )
    if axes == "auto" and x.ndim in (3, 4):
        known = {3: "nsd if axis 1 is sites (or models), or ntd if it is positions of a text", 4: "ntsd"}
        raise SettingError(f"{literal(file)} has shape {shape}: type {{axes}}={known[x.ndim]}.")
    wanted = "nd" if axes == "auto" else axes
    if x.ndim != NDIM[wanted]:
        meant = ", ".join(wanted)
        raise SettingError(
            f"{literal(file)} has shape {shape}, but {{axes}}={axes} stands for ({meant}): save a tensor with "
            f"{NDIM[wanted]} axes, of which the last is the width, or correct {{axes}}."
        )
    if 0 in shape[1:]:
        raise UserError(f"{file} has shape {shape}, so its activations have no numbers: save them again.")
    return {
        "nd": lambda: x.unsqueeze(1),
        "nsd": lambda: x,
        "ntd": lambda: x.flatten(0, 1).unsqueeze(1),
        "ntsd": lambda: x.flatten(0, 1),
    }[wanted]()


def check_alike(parts: Sequence[Part]) -> None:
    """Raise a SettingError if the parts differ in width or in the number of sources."""
    first = parts[0]
    for part in parts:
        (s, d), (s_first, d_first) = part.rows.shape[1:], first.rows.shape[1:]
        if (s, d) != (s_first, d_first):
            raise SettingError(
                f"{literal(part.file)} has {s} × {d} numbers in a row (sources × width), and {literal(first.file)} has "
                f"{s_first} × {d_first}: put files of one shape into {{path}}."
            )
