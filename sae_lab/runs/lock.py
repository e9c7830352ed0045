"""Locks on run folders: one process at a time trains in a folder, and one open file locks all folders of a group.

A folder is locked while a process holds `flock` on the file `.lock` in it. The lock belongs to the file and not to its
name, so the folders of a group share one file by hard links, and a group of 1,000 needs no 1,000 open files.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sae_lab.runtime.errors import FolderInUse

LOCK = ".lock"
ATTEMPTS = 20  # a look at the status of a run holds its lock for a moment
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)  # some file systems have none


@contextmanager
def lock_folder(folder: Path, leader: Path | None = None) -> Iterator[None]:
    """Hold the lock of a run folder inside the block.

    Args:
        leader: a folder that this process has locked and keeps locked for longer; its lock becomes that of `folder`.

    Raises:
        FolderInUse: another process holds the lock.
    """
    path, new = folder / LOCK, folder / f"{LOCK}.{os.getpid()}"
    with acquire(path):  # of an earlier run, perhaps shared by the folders of its group: hence replaced
        new.unlink(missing_ok=True)
        file = None if leader is not None and link(leader / LOCK, new) else new.open("wb")
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        new.replace(path)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def acquire(path: Path) -> BinaryIO:
    """Open a lock file and lock it; raise FolderInUse if another process has it."""
    for _ in range(ATTEMPTS):
        file = path.open("ab")
        if try_lock(file, fcntl.LOCK_EX) and is_same_file(file, path):
            return file
        file.close()
        time.sleep(0.01)
    raise FolderInUse(f"another process trains in {path.parent}: wait for it, or choose another hydra.run.dir.")


def is_same_file(file: BinaryIO, path: Path) -> bool:
    """Return whether the path still leads to an open file: another process may have replaced it before the lock."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def link(source: Path, path: Path) -> bool:
    """Make a hard link; return False where the file system has none."""
    try:
        os.link(source, path)
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
        return False
    return True


def try_lock(file: BinaryIO, kind: int) -> bool:
    """Try to lock an open file until it is closed or this process exits. Returns False if another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_running(folder: Path) -> bool:
    """Return whether a process is training in this folder."""
    if not (folder / LOCK).is_file():
        return False
    with (folder / LOCK).open("rb") as file:
        return not try_lock(file, fcntl.LOCK_SH)  # shared: two who look do not see each other
