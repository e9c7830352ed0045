"""A log file for every member of a group, though one process trains them all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

MEMBER: ContextVar[Path | None] = ContextVar("MEMBER", default=None)
"""The run folder that is being worked for; None: all of them."""


@contextmanager
def logging_for(folder: Path) -> Iterator[None]:
    token = MEMBER.set(folder)
    try:
        yield
    finally:
        MEMBER.reset(token)


@contextmanager
def log_files(folders: list[Path]) -> Iterator[None]:
    """One log file a folder, in place of the one that Hydra has opened: each gets what is said of it or of all."""
    root = logging.getLogger()
    theirs = [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]
    ours = [log_file(folder, handler) for folder in folders for handler in theirs]
    root.handlers = [*(handler for handler in root.handlers if handler not in theirs), *ours]
    try:
        yield
    finally:
        for handler in ours:
            root.removeHandler(handler)
            handler.close()


def log_file(folder: Path, like: logging.FileHandler) -> logging.FileHandler:
    """A log file of the same name and form in another folder; what is said before the folder is there is not kept."""
    handler = logging.FileHandler(folder / Path(like.baseFilename).name, delay=True)
    handler.setFormatter(like.formatter)
    handler.addFilter(lambda record: folder.is_dir() and MEMBER.get() in (None, folder))
    return handler
