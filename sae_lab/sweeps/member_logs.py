"""Log files: one per member of a group, although one process trains them all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

MEMBER: ContextVar[Path | None] = ContextVar("MEMBER", default=None)
"""The run folder of the member to which log messages belong; None: to all members."""


@contextmanager
def logging_for(folder: Path) -> Iterator[None]:
    """Write log messages inside the block to the log file of one member only."""
    token = MEMBER.set(folder)
    try:
        yield
    finally:
        MEMBER.reset(token)


@contextmanager
def log_files(folders: list[Path]) -> Iterator[None]:
    """Replace Hydra's log file by one log file per folder, which gets the messages of its member and those of all."""
    root = logging.getLogger()
    replaced = [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]
    added = [log_file(folder, handler) for folder in folders for handler in replaced]
    root.handlers = [*(handler for handler in root.handlers if handler not in replaced), *added]
    try:
        yield
    finally:
        for handler in added:
            root.removeHandler(handler)
            handler.close()


def log_file(folder: Path, like: logging.FileHandler) -> logging.FileHandler:
    """Return a handler like `like` for a file in `folder`. Messages are dropped until the folder exists."""
    handler = logging.FileHandler(folder / Path(like.baseFilename).name, delay=True)
    handler.setFormatter(like.formatter)
    handler.addFilter(lambda record: folder.is_dir() and MEMBER.get() in (None, folder))
    return handler
