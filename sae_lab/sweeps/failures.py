"""Failed jobs: `failed.txt` in the job's folder holds the reason."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lab.cli.explain import explain
from sae_lab.runs.folder import FAILED
from sae_lab.runtime.errors import FolderInUse
from sae_lab.runtime.files import write_atomically
from sae_lab.sweeps.status import log


@contextmanager
def failure_recorded(folder: Path) -> Iterator[None]:
    """Record an exception inside the block in `failed.txt` instead of raising it. Removes the file of earlier attempts.

    If another process is training in the folder, a warning is logged and no file is written.
    """
    (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except FolderInUse as e:
        log.warning("%s", e)
    except Exception as e:
        record_failure(folder, e)


def record_failure(folder: Path, error: Exception) -> None:
    """Write `failed.txt`: the reason in one line and, unless it is a user's mistake, the traceback."""
    sentence = explain(error, "train", [])
    reason = sentence or " ".join(f"{type(error).__name__}: {error}".split())
    details = "" if sentence else "\n" + "".join(traceback.format_exception(error))
    write_atomically(folder / FAILED, f"{reason}\n{details}".encode())
    log.error("%s failed: %s", folder.name, reason)
