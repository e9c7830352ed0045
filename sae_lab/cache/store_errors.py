"""Errors of file systems and of libraries for object stores, as one sentence that says what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.registry import known_implementations

from sae_lab.runtime.errors import UserError, first_line


@contextmanager
def explain_errors(url: str, is_local: bool, what: str) -> Iterator[None]:
    """Turn an error inside the context into a UserError: the folder at `url` was to be `what` ("read" or "written").

    Those of reading local files are left as they are, and so is a missing file that was to be read. Libraries of
    object stores have exceptions of their own, such as for missing credentials.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        of_library = not is_local and type(e).__module__ != "builtins"
        is_missing_file = isinstance(e, FileNotFoundError) or is_local
        if not (isinstance(e, OSError) or of_library) or (what == "read" and is_missing_file):
            raise
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of {url} is full: free some space, then run the same command again to continue."
            ) from e
        reason = getattr(e, "strerror", None) or first_line(e)
        of_server = "check its address, and the address and the credentials of the server in the environment"
        remedy = "choose another cache_dir=..." if is_local else of_server
        raise UserError(f"{url} cannot be {what} ({reason}): {remedy}.") from e


def package_of(url: str | Path) -> str:
    """Return the package that fsspec needs for a URL, as it says itself ("Install s3fs to access S3")."""
    said = known_implementations.get(str(url).partition("://")[0], {}).get("err", "")
    found = re.search(r"nstall ['\"]?([\w.-]+)", said)
    return found[1] if found else "the package that fsspec names for it"
