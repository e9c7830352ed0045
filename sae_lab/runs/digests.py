"""digests.json of a run folder: the digests of its files. A file that changed since the run wrote it is not used.

A file is recorded before it is replaced and again afterwards. In between, its old and its new content are both
accepted, so a run that is killed at any moment still fits its record.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_file, digest_of_json, read_json, write_json

log = logging.getLogger(__name__)

DIGESTS = "digests.json"
SAE = "sae/config.json"
"""It holds the digests of the other files of its folder."""
MISSING = ""
"""The digest of a file that does not exist."""
CHECKPOINT, METRICS = "checkpoints/last.ckpt", "metrics.json"
HYDRA = ("config.yaml", "overrides.yaml", "hydra.yaml", "from_environment.txt")
SETTINGS = (*(f".hydra/{name}" for name in HYDRA), METRICS)
"""Small files, which are checked together whenever the config is read. metrics.json may be deleted: an evaluation
writes it again."""


@contextmanager
def recorded(folder: Path, digests: Mapping[str, str], begin: bool = False) -> Iterator[None]:
    """Record the digests of files that are replaced inside the block, by their path in the run folder.

    Does nothing in a folder without a record, unless this is the one to begin it.
    """
    if not (begin or (folder / DIGESTS).is_file()):
        yield
        return
    before = read_digests(folder)
    both = {name: [*before.get(name, [digest_in(folder, name)]), digest] for name, digest in digests.items()}
    write_digests(folder, before | both)
    yield
    write_digests(folder, before | {name: [digest] for name, digest in digests.items()})


@contextmanager
def recorded_when_written(folder: Path, name: str) -> Iterator[None]:
    """Record the digest of a file that the block writes; inside the block it is not recorded.

    Does nothing in a folder without a record.
    """
    if not (folder / DIGESTS).is_file():
        yield
        return
    accepted = {known: digests for known, digests in read_digests(folder).items() if known != name}
    write_digests(folder, accepted)
    yield
    write_digests(folder, accepted | {name: [digest_in(folder, name)]})


def write_digests(folder: Path, accepted: Mapping[str, list[str]]) -> None:
    write_json(folder / DIGESTS, {**accepted, DIGESTS: digest_of_json(accepted)})


def read_digests(folder: Path) -> dict[str, list[str]]:
    """Return the accepted digests of each recorded file. Empty if the run has none: earlier versions wrote none.

    Raises:
        UserError: digests.json is damaged.
    """
    file = folder / DIGESTS
    if not os.path.lexists(file):
        return {}
    try:
        accepted = read_json(file)
        if accepted.pop(DIGESTS, None) != digest_of_json(accepted):
            raise ValueError("its own digest differs")
        if not all(isinstance(known, list) for known in accepted.values()):
            raise ValueError("it holds no lists")
    except (OSError, ValueError) as e:
        raise UserError(f"{file} is damaged ({e}): restore it, or delete it to use the run unchecked.") from e
    return accepted


def check_unaltered(folder: Path, *names: str) -> bool:
    """Compare files of a run folder with its digests.json. Returns whether all of them are recorded there.

    Raises:
        UserError: a file changed since the run wrote it.
    """
    accepted = read_digests(folder)
    found = {name: digest_in(folder, name) for name in names if name in accepted}
    deleted = {METRICS: MISSING}.items()
    if altered := [name for name, digest in found.items() - deleted if digest not in accepted[name]]:
        if read_digests(folder) != accepted:  # the run has written since
            return check_unaltered(folder, *names)
        file = folder / min(altered)
        what = "changed since the run wrote it" if file.is_file() else "is missing"
        remedy = "delete it and evaluate again" if file.name == METRICS else "type resume=never to train again"
        raise UserError(
            f"{file} {what}: restore it, or {remedy}. If you changed it on purpose, delete {folder / DIGESTS}."
        )
    return len(found) == len(names)


def digest_in(folder: Path, name: str) -> str:
    return digest_of_file(folder / name) if (folder / name).is_file() else MISSING


def is_recorded(folder: Path, name: str) -> bool:
    """Return whether the run has written this file."""
    return MISSING not in read_digests(folder).get(name, [MISSING])


def warn_if_unchecked(folder: Path) -> None:
    """Warn if a run has no digests."""
    if not (folder / DIGESTS).is_file():
        log.warning("%s was written without digests: damage to its files cannot be noticed.", folder)
