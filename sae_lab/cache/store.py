"""A folder of atomically written files, on this machine or at any URL that fsspec supports."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from sae_lab.cache.store_errors import explain_errors, package_of
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import locked, write_atomically

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}
"""Protocols without folders. A folder is not made there, because that would make a missing bucket."""


class Store:
    """The folder at `url`.

    Raises:
        UserError: the URL's protocol is unknown or needs a package that is not installed; a read or a write fails. A
            file that is missing raises FileNotFoundError.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/")
        self.fs, self.root = file_system_of(self.url)
        self.folder = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None
        self._explain = partial(explain_errors, self.url, self.folder is not None)
        self._has_folders = not OBJECT_STORES & {self.fs.protocol, *self.fs.protocol}

    def within(self, name: str) -> "Store":
        """Return the folder of this name in the folder."""
        self.path(name)
        return Store(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        """Return the path of a file in the folder.

        Raises:
            UserError: the name leads out of the folder, by itself or by a symbolic link.
        """
        if name != Path(name).name or (self.folder is not None and (self.folder / name).is_symlink()):
            raise UserError(f"{self.url} names {name}, which leads out of its folder: harvest into another cache_dir.")
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        with self._explain("read"):
            self.fs.invalidate_cache()
            return self.fs.exists(self.path(name))

    def names(self) -> list[str]:
        """Return the names in the folder as they are now; none if there is no folder."""
        with self._explain("read"):
            self.fs.invalidate_cache()
            try:
                return sorted(Path(path).name for path in self.fs.ls(self.root, detail=False))
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes:
        with self._explain("read"):
            return self.fs.cat_file(self.path(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return these bytes of a file, or as many as it has."""
        with self._explain("read"):
            return self.fs.cat_file(self.path(name), start=start, end=stop)

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file atomically: readers, and a crash, see the old file or the new one, never a mix."""
        with self._explain("written"):
            if self.folder is not None:
                write_atomically(Path(self.path(name)), content)
            else:  # in object stores, an object becomes visible only when it is complete
                self.make_folder()
                self.fs.pipe_file(self.path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one; return whether this call has made it. Of several calls at once, one has.

        Local and network disks ensure this by O_EXCL, S3 and Google Cloud Storage by a condition of the put. Where
        fsspec can only look first and then write, two calls may both succeed. A reader may see the file before its
        content. If the folder is gone, nothing is written.
        """
        path = self.path(name)
        with self._explain("written"):
            try:
                if self.folder is not None:
                    with Path(path).open("xb") as f:
                        f.write(content)
                else:
                    self.fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as e:  # S3 also answers that two calls conflict
                folder_is_gone = isinstance(e, FileNotFoundError) and self._has_folders
                if not folder_is_gone and not self.exists(name):
                    raise
                return False
            return True

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with self._explain("written"):
            try:
                self.fs.rm_file(self.path(name))
            except FileNotFoundError:
                return

    def remove_folder(self) -> None:
        """Remove the folder with its files, which other processes may be removing too."""
        for name in self.names():
            self.remove(name)
        if self._has_folders:
            with suppress(OSError):  # another process has removed it, or still writes there and removes it then
                self.fs.rmdir(self.root)

    def make_folder(self) -> None:
        """Make the folder, if there is none."""
        with self._explain("written"):
            if self._has_folders:
                self.fs.makedirs(self.root, exist_ok=True)

    def remove_partial_files(self) -> None:
        """Remove temporary files of processes that were killed while writing."""
        for left in self.folder.glob(".*.*.*") if self.folder is not None else ():
            left.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock; log a message if another process has it, and wait.

        The lock of a remote folder only excludes other processes on this machine.
        """
        with ExitStack() as stack:
            with self._explain("written"):
                waiting = f"Another process is writing to {self.url}: waiting for it."
                stack.enter_context(locked(self._lock_file(), waiting))
            yield

    def _lock_file(self) -> Path:
        if self.folder is not None:
            return self.folder / ".lock"
        return Path(tempfile.gettempdir()) / f"sae_lab-{xxhash.xxh3_64_hexdigest(self.url.encode())}.lock"


def file_system_of(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a folder or URL, and the path in it.

    Raises:
        UserError: the URL's protocol is unknown or needs a package that is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url if "://" in url else str(Path(url).expanduser()))
    except ImportError as e:
        raise UserError(f"{url} needs a package that is not installed: type pip install {package_of(url)}.") from e
    except ValueError as e:
        raise UserError(f"{url} cannot be opened ({e}): give a folder, or a URL that fsspec knows.") from e
