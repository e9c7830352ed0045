"""What went wrong with a job: failed.txt in its folder."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lab.cli.explain import explain
from sae_lab.runs.folder import FAILED
from sae_lab.runtime.errors import Busy
from sae_lab.runtime.files import write_atomically
from sae_lab.sweeps.status import log


@contextmanager
def failure_recorded(folder: Path) -> Iterator[None]:
    """Keep an exception from the caller, and write its reason to `failed.txt`, which an earlier attempt may have left.

    A folder in which another process trains is that process's affair.
    """
    (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except Busy as e:
        log.warning("%s", e)
    except Exception as e:
        record_failure(folder, e)


def record_failure(folder: Path, error: Exception) -> None:
    """Write `failed.txt`: the reason in a line, and for what was no user's mistake the traceback."""
    sentence = explain(error, "train", [])
    reason = sentence or " ".join(f"{type(error).__name__}: {error}".split())
    details = "" if sentence else "\n" + "".join(traceback.format_exception(error))
    write_atomically(folder / FAILED, f"{reason}\n{details}".encode())
    log.error("%s failed: %s", folder.name, reason)
