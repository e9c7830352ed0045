"""Look into the zip archives of NumPy and PyTorch before anything in them is read: sizes, checksums, kinds of arrays.

Both are archives of uncompressed arrays. A compressed part of a few megabytes can stand for gigabytes, and neither
library compares the checksums of what it maps.
"""

import math
import zipfile
from pathlib import Path

import numpy as np

from sae_lab.runtime.memory import check_memory

MOST_COMPRESSED = 100
"""Uncompressed over compressed bytes of an archive. Trained weights reach 1.1; zeros reach 1,000."""


def check_torch(file: Path, every_part: bool = True) -> None:
    """Check an archive of torch.save: its parts are as long as it says and, if `every_part`, have their checksums.

    Without `every_part`, only the part that is unpickled is compared with its checksum.

    Raises:
        ValueError: it is damaged or compressed.
        BadZipFile: it is not an archive, as files written before torch 1.6 are.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("a part is compressed, which torch.save never does")
        if every_part and (damaged := archive.testzip()):
            raise ValueError(f"its part {damaged} is damaged")
        for part in parts:
            if part.filename.endswith("/data.pkl"):
                archive.read(part)


def check_numpy(file: Path) -> None:
    """Check a .npz file: what its headers declare is what it holds.

    Raises:
        ValueError: it is damaged, holds more than plain arrays, or is compressed too well to be weights.
        UserError: it does not fit the memory.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        size = sum(part.file_size for part in parts)
        check_memory(file, size)
        if size > MOST_COMPRESSED * file.stat().st_size:
            raise ValueError(f"{size:,} bytes are compressed to {file.stat().st_size:,}")
        for part in parts:
            if array_size(archive, part) != part.file_size:
                raise ValueError(f"the array {part.filename} is not as large as it says")


def array_size(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> int:
    """Return the bytes that a .npy part must have by its header."""
    with archive.open(part) as f:
        version = np.lib.format.read_magic(f)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(f)
        else:
            raise ValueError(f"the array {part.filename} is of version {version}")
        if dtype.kind not in "fiu":
            raise ValueError(f"the array {part.filename} is of type {dtype}, not of numbers")
        return f.tell() + math.prod(shape) * dtype.itemsize
