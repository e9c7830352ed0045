"""Text that every machine has: the source of Python's standard library, and its bytecode listings."""

import dis
import io
import os
import re
import sysconfig
import warnings
import zlib
from functools import cache
from pathlib import Path

from sae_lab.text.documents import HELD_OUT, TRAIN, IndexedDocuments, digest_of, stamp_of


def is_held_out(name: str, every: int) -> bool:
    """Whether a document belongs to the held-out split: one in `every`, chosen by a checksum of its name."""
    return zlib.crc32(name.encode()) % every == 0


LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3"}


@cache  # a run lists them six times
def module_names(root: Path) -> tuple[str, ...]:
    """Return the paths of the modules below a folder, without those in the folders of LEFT_OUT."""
    names = []
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - LEFT_OUT  # not walked: site-packages alone may hold most of the files
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return tuple(sorted(names))


class StdlibDocuments(IndexedDocuments):
    """The source of the running Python's standard library; one document per module.

    Tests are left out, because some distributions do not ship them, and so are the character tables of `encodings`.
    One module in `held_out_every` belongs to the split `held_out`, the others to `train`.
    """

    def __init__(self, split: str = TRAIN, seed: int = 0, held_out_every: int = 10):
        super().__init__(seed, split)
        root = Path(sysconfig.get_paths()["stdlib"])
        self.paths = [root / n for n in module_names(root) if is_held_out(n, held_out_every) == (split == HELD_OUT)]

    def digest(self, thorough: bool = True) -> str:
        return digest_of(self.paths, thorough)

    def fingerprint(self) -> str:
        return stamp_of(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str:
        return self.paths[i].read_text(encoding="utf-8", errors="replace")


class DisassembledStdlib(StdlibDocuments):
    """Bytecode listings (`dis`) of the modules of StdlibDocuments, each cut to the length of the module's source.

    With `mixed`, the sources are documents too. A module that does not compile is an empty document.
    """

    def __init__(self, split: str = TRAIN, seed: int = 0, held_out_every: int = 10, mixed: bool = False):
        super().__init__(split, seed, held_out_every)
        self.mixed = mixed

    def __len__(self) -> int:
        return len(self.paths) * (1 + self.mixed)

    def __getitem__(self, i: int) -> str:
        source = super().__getitem__(i % len(self.paths))
        return source if i >= len(self.paths) else disassemble(source)[: len(source)]


def disassemble(source: str) -> str:
    """Return the bytecode listing of a module's source, without memory addresses; empty if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(source, "module", "exec")
    except (SyntaxError, ValueError):
        return ""
    listing = io.StringIO()
    dis.dis(code, file=listing)
    return re.sub(r" at 0x[0-9a-f]+", "", listing.getvalue())
