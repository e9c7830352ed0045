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
    added = [MemberLogs(folders, handler) for handler in replaced]
    root.handlers = [*(handler for handler in root.handlers if handler not in replaced), *added]
    try:
        yield
    finally:
        for handler in added:
            root.removeHandler(handler)


class MemberLogs(logging.Handler):
    """Appends each record to the log files of the members that it belongs to. Holds no file open between records.

    Records are dropped until the member's folder exists.

    Args:
        folders: the run folders of the members.
        like: the handler whose file name and format are used.
    """

    def __init__(self, folders: list[Path], like: logging.FileHandler):
        super().__init__()
        self.folders, self.file_name = folders, Path(like.baseFilename).name
        self.setFormatter(like.formatter)

    def emit(self, record: logging.LogRecord) -> None:
        member, text = MEMBER.get(), f"{self.format(record)}\n"
        for folder in self.folders if member is None else [member]:
            if folder.is_dir():
                with (folder / self.file_name).open("a", encoding="utf-8") as log:
                    log.write(text)
