"""A folder of files that appear whole, on this machine or behind any URL that fsspec knows."""

import errno
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import xxhash
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically

log = logging.getLogger(__name__)

COPIES = Path("~/.cache/sae_lab").expanduser()  # where files from afar are kept, so that they can be mapped into memory


class Store:
    """The folder at `url`. On this machine its files are used where they lie; from afar, copies of them are.

    Raises:
        UserError: the URL's protocol is not known or needs a package that is not there; a write that fails.
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
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def size(self, name: str) -> int:
        return self.fs.size(self.path(name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def local_file(self, name: str) -> Path:
        """The file itself, or a copy of it, fetched when first asked for."""
        if self.folder is not None:
            return self.folder / name
        options = {"cache_storage": str(COPIES), "check_files": True}
        return Path(fsspec.open_local(f"filecache::{self.url}/{name}", filecache=options))

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file there, in place of an older one; a reader or a crash sees the one or the other."""
        with self._explain_errors():
            if self.folder is not None:
                write_atomically(self.folder / name, content)
            else:  # object stores show an object once all of it is there
                self.fs.makedirs(self.root, exist_ok=True)
                self.fs.pipe_file(self.path(name), content)

    def sweep(self) -> None:
        """Remove what processes that were killed while they wrote have left behind."""
        for left in self.folder.glob(".*.*.*") if self.folder is not None else ():
            left.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone at work in this folder (afar: on this machine); where another process is, wait for it and say so."""
        with self._explain_errors():
            file = self._lock_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("Another process is at work on %s: waiting for it.", self.url)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _lock_file(self) -> Path:
        if self.folder is not None:
            return self.folder / ".lock"
        return Path(tempfile.gettempdir()) / f"sae_lab-{xxhash.xxh3_64_hexdigest(self.url.encode())}.lock"

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"The disk of {self.url} is full: make room, and the same command continues.") from e
            reason = e.strerror or str(e)
            raise UserError(f"{self.url} cannot be written ({reason}): choose another cache_dir=...") from e
