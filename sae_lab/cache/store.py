"""A folder of atomically written files, on this machine or at any URL that fsspec supports."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import locked, write_atomically
from sae_lab.runtime.user_cache import user_cache


class Store:
    """The folder at `url`. Local files are used in place; remote files are copied to `user_cache()` first.

    Raises:
        UserError: the URL's protocol is unknown or needs a package that is not installed; a write fails.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(
                str(Path(url).expanduser()) if "://" not in str(url) else self.url
            )
        except (ImportError, ValueError) as e:
            raise UserError(f"{url} cannot be opened ({e}): give a folder, or a URL that fsspec knows.") from e
        self.folder = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def path(self, name: str) -> str:
        """Return the path of a file in the folder.

        Raises:
            UserError: the name leads out of the folder, by itself or by a symbolic link.
        """
        if name != Path(name).name or (self.folder is not None and (self.folder / name).is_symlink()):
            raise UserError(f"{self.url} names {name}, which leads out of its folder: harvest into another cache_dir.")
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def size(self, name: str) -> int:
        return self.fs.size(self.path(name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def local_file(self, name: str) -> Path:
        """Return the path of the file, or of a local copy, which is downloaded at the first call."""
        path = self.path(name)
        if self.folder is not None:
            return Path(path)
        options = {"cache_storage": str(user_cache()), "check_files": True}
        return Path(fsspec.open_local(f"filecache::{self.url}/{name}", filecache=options))

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file atomically: readers, and a crash, see the old file or the new one, never a mix."""
        with self._explain_errors():
            if self.folder is not None:
                write_atomically(Path(self.path(name)), content)
            else:  # in object stores, an object becomes visible only when it is complete
                self.fs.makedirs(self.root, exist_ok=True)
                self.fs.pipe_file(self.path(name), content)

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
            with self._explain_errors():
                waiting = f"Another process is writing to {self.url}: waiting for it."
                stack.enter_context(locked(self._lock_file(), waiting))
            yield

    def _lock_file(self) -> Path:
        if self.folder is not None:
            return self.folder / ".lock"
        return Path(tempfile.gettempdir()) / f"sae_lab-{xxhash.xxh3_64_hexdigest(self.url.encode())}.lock"

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn an OSError inside the context into a UserError."""
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"The disk of {self.url} is full: free some space, then run the same command again to continue."
                ) from e
            reason = e.strerror or str(e)
            raise UserError(f"{self.url} cannot be written ({reason}): choose another cache_dir=...") from e
