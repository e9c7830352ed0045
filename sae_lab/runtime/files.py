"""Atomic file writes, small files that are read with a limit, and digests of files."""

import errno
import json
import logging
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import xxhash
from filelock import FileLock, Timeout

from sae_lab.runtime.os_errors import naming
from sae_lab.runtime.signals import raise_if_stopped

log = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path`, flushed to disk, when the block ends without an exception.

    After a crash, or for another process, `path` is the old file or the new one, never a part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process id: processes of several machines may write into one folder.
    temporary = path.with_name(f".{path.name}.{uuid4().int}")
    try:
        with naming(path, temporary):
            with temporary.open("wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_out(path: Path) -> None:
    """Raise an OSError if a file cannot be written there, before there is anything to write. Leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device or a pipe, which a file would replace
        raise FileExistsError(errno.EEXIST, "It is not a file", str(path))
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def locked(file: Path, waiting: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file. While another process holds it, wait; log the sentence `waiting` after `patience` seconds.

    Raises:
        SafeStop: a signal arrived while waiting.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    begun, told, seconds = time.monotonic(), False, 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            raise_if_stopped()
            seconds = 1.0
            if not told and time.monotonic() - begun >= patience:
                log.info("%s", waiting)
                told = True
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. No process may be writing there."""
    for path in folder.glob(".*.*"):
        if path.suffix[1:].isdigit():
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file through `atomic_file`."""
    with atomic_file(path) as f:
        f.write(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON atomically; raise a ValueError if a number is NaN or infinite, which JSON does not have."""
    write_atomically(path, format_json(content))


def format_json(content: Mapping[str, Any]) -> bytes:
    """Return the bytes that `write_json` writes."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_small(path: Path, limit: int = 64 * 2**20) -> str:
    """Read a text file of at most `limit` bytes.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is larger, or not UTF-8.
    """
    if path.is_fifo():  # it would wait for a writer
        raise ValueError("it is a pipe")
    with path.open("rb") as f:
        content = f.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit / 2**20:g} MiB")
    return content.decode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is too large, or not a JSON object.
    """
    return parse_json(read_small(path))


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object; raise a ValueError for anything else, including one that is nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def digest_of_file(path: Path) -> str:
    """Return the xxh3-128 digest of a file's bytes, read through a memory map (several GB/s)."""
    with path.open("rb") as f:
        if os.fstat(f.fileno()).st_size == 0:
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return xxhash.xxh3_128_hexdigest(content)


def digest_of_json(content: Any) -> str:
    """Return the xxh3-128 digest of plain values, whatever the order of their keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
