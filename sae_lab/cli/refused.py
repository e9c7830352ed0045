"""What a command finds where it begins: a refused command leaves that and nothing else."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

OF_A_RUN, OF_A_SWEEP = (".hydra/*",), ("multirun.yaml", "jobs.txt")
"""Files that are written before a command knows whether it can do what was asked. Beside them there is its log."""


@dataclass(frozen=True)
class Found:
    """A folder as a command found it.

    Args:
        early: patterns of files that this command writes before its work.
        missing: the folder and its parents, from the inside out, as far as they were not there.
        names: what the folder held.
        contents: of the early files that were there.
    """

    folder: Path
    early: Sequence[str]
    missing: list[Path]
    names: set[str]
    contents: dict[Path, bytes]

    def restore(self) -> None:
        """Remove what is new, unless it holds more than early files: then this command, or another one, has worked."""
        new = [path for top in self.folder.iterdir() if top.name not in self.names for path in (top, *walk(top))]
        files, logs = [path for path in new if path.is_symlink() or not path.is_dir()], own_logs()
        if not all(path in logs or any(map(path.match, self.early)) for path in files):
            return
        for file in files:
            file.unlink()
        for file, content in self.contents.items():
            file.write_bytes(content)
        for folder in (*(path for path in reversed(new) if path not in files), *self.missing):
            folder.rmdir()


_found: dict[Path, Found] = {}


def remember_as_found(folder: Path, early: Sequence[str] = (*OF_A_RUN, *OF_A_SWEEP)) -> None:
    """Remember what is in a folder, before a command creates it or writes to it."""
    folder = folder.absolute()
    with suppress(OSError):  # it cannot be read, which is said where it is used
        if folder not in _found:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            names = set() if missing else {path.name for path in folder.iterdir()}
            contents = {folder / name: (folder / name).read_bytes() for name in early if name in names}
            _found[folder] = Found(folder, early, missing, names, contents)


def own_logs() -> list[Path]:
    """Return the files that this process logs to."""
    handlers = logging.getLogger().handlers
    return [Path(handler.baseFilename) for handler in handlers if isinstance(handler, logging.FileHandler)]


def leave_as_found() -> None:
    """Restore the folders of a command that was refused."""
    while _found:
        _, found = _found.popitem()
        with suppress(OSError):  # it is gone, or another process has written to it
            found.restore()


def walk(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder, each folder before what it holds."""
    return folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else iter(())


class RememberFolder(Callback):
    """Remembers the folder of a run or a sweep, before Hydra creates it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._remember(config, "hydra.run.dir", OF_A_RUN)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._remember(config, "hydra.sweep.dir", OF_A_SWEEP)

    def _remember(self, config: DictConfig, key: str, early: Sequence[str]) -> None:
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # to which `${hydra:...}` refers
        with suppress(OmegaConfBaseException):  # Hydra resolves it again, and raises
            remember_as_found(Path(str(OmegaConf.select(config, key))), early)
        HydraConfig.instance().cfg = before
