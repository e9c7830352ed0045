"""What the operating system refuses: a full disk, a folder that is read-only, a path that is too long."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lab.runtime.errors import UserError

NOT_WRITABLE = "change its permissions, or choose another path"
IN_THE_WAY = "move away what is in its place, or choose another path"
AGAIN = "then type the same command again"
REMEDIES = {
    errno.ENOSPC: f"free some space there, {AGAIN}",
    errno.EDQUOT: f"free some of your quota there, {AGAIN}",
    errno.EFBIG: f"raise the limit of file sizes (`ulimit -f`), {AGAIN}",
    errno.EACCES: NOT_WRITABLE,
    errno.EPERM: NOT_WRITABLE,
    errno.EROFS: "choose a path that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "remove the symbolic link that leads to itself, or choose another path",
    errno.ENOTDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.ENOENT: "correct the path",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`), or run fewer jobs at a time",
    errno.ENFILE: "close other programs, or run fewer jobs at a time",
    errno.ENOMEM: "free some memory",
    errno.EIO: "check the disk",
    errno.ESTALE: f"check the network drive, {AGAIN}",
}


def explain_os_error(error: OSError) -> str | None:
    """Return one sentence: the path, the reason of the operating system, and what to do.

    None for errors that programs raise under the same name, such as those of a network library, and for what no user
    can mend. (Those keep their traceback.)
    """
    if error.errno not in REMEDIES or error.strerror is None:
        return None
    path = error.filename2 or error.filename
    what = f"{path!r}" if isinstance(path, int) else str(path or "a file")
    return f"{what} cannot be used ({error.strerror}): {REMEDIES[error.errno]}."


def reason_of(error: Exception) -> str:
    """Return why something failed, in one line: what the operating system said, or the message and its class."""
    if isinstance(error, OSError) and (refusal := explain_os_error(error)):
        return refusal
    return " ".join((str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}").split())


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name the path in errors of the operating system that have none, as of a full disk, or have that of `temporary`.

    torch.save hides such an error behind a RuntimeError of its archive; the error itself is raised instead.
    """
    try:
        yield
    except (OSError, RuntimeError) as e:
        error = e if isinstance(e, OSError) else e.__context__
        if not isinstance(error, OSError):
            raise
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise error from None
