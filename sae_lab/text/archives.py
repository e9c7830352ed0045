"""Open files as they come: compressed, in a tar or zip archive, with a byte order mark, or not there yet."""

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from sae_lab.runtime.errors import UserError
from sae_lab.text.formats import is_archive

BOM, UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs"


def open_zstd(file: Any) -> IO[bytes]:
    import pyarrow as pa

    return cast("IO[bytes]", pa.input_stream(file, compression="zstd"))


OPENERS: dict[str, Callable[..., IO[bytes]]] = {
    ".gz": cast("Callable[..., IO[bytes]]", gzip.open),
    ".bz2": cast("Callable[..., IO[bytes]]", bz2.open),
    ".xz": cast("Callable[..., IO[bytes]]", lzma.open),
    ".zst": open_zstd,
}


def names_in(archive: Path) -> list[str]:
    """Return the names of the files in an archive, in its order.

    Raises:
        UserError: the archive is broken.
    """
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as files:
                return [entry.filename for entry in files.infolist() if not entry.is_dir()]
        with tarfile.open(archive) as tar:
            return [member.name for member in tar if member.isfile()]
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError) as e:
        raise UserError(f"{archive} cannot be read as an archive ({e}): download or make it again.") from e


@contextmanager
def opened(file: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Open a file, and yield (name, decompressed stream) of it, or of each file of an archive, to be read in turn."""
    name = file.name.lower()
    if not is_archive(name):
        with OPENERS.get(file.suffix.lower(), open_plain)(file) as stream:
            yield iter([(str(file), stream)])
    elif name.endswith(".zip"):
        with zipfile.ZipFile(file) as files:
            entries = (entry for entry in files.infolist() if not entry.is_dir())
            yield ((entry.filename, decompressed(entry.filename, files.open(entry))) for entry in entries)
    else:
        with tarfile.open(file) as tar:
            members = (member for member in tar if member.isfile())
            yield ((m.name, decompressed(m.name, cast("IO[bytes]", tar.extractfile(m)))) for m in members)


def open_plain(file: Path) -> IO[bytes]:
    return file.open("rb")


def decompressed(name: str, stream: IO[bytes]) -> IO[bytes]:
    opener = OPENERS.get(Path(name.lower()).suffix)
    return opener(stream) if opener else stream


def plain_utf8(stream: IO[bytes]) -> IO[bytes]:
    """Return a stream of text at its first character, after the byte order mark.

    Raises:
        UserError: the text is UTF-16, or a pointer of Git LFS instead of the file.
    """
    buffered = BufferedReader(cast("Any", stream))
    head = buffered.peek(64)[:64]
    if head.startswith(UTF16):
        raise UserError("it is UTF-16: convert it to UTF-8")
    check_no_pointer(head)
    if head.startswith(BOM):
        buffered.read(len(BOM))
    return cast("IO[bytes]", buffered)


def check_no_pointer(head: bytes) -> None:
    """Raise a UserError if a file begins as a pointer of Git LFS does."""
    if head.startswith(LFS_POINTER):
        raise UserError("it is a pointer of Git LFS and not the file: run git lfs pull")
