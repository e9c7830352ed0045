"""What can happen to a file, for the tests of damaged folders."""

import random
from pathlib import Path

KINDS = [*(f"flip {seed}" for seed in range(10)), "cut", "cut at the end", "emptied", "longer", "foreign", "missing"]
"""Every kind of damage. A flip is of one bit, at a place drawn with the seed."""


def damage(file: Path, kind: str, foreign: bytes) -> None:
    """Damage a file; `foreign` is what stands in the same file of another folder."""
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind.startswith("flip"):
        file.write_bytes(flipped(content, random.Random(kind).randrange(8 * len(content))))
    else:
        assert foreign != content
        new = {"cut": content[: len(content) // 2], "cut at the end": content[:-3], "emptied": b"", "foreign": foreign}
        file.write_bytes(new[kind] if kind in new else content + content)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
