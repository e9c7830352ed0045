"""Memory that is freed in pieces of changing sizes."""

import sys

import psutil
import pytest
import torch
from shell import FORKS

from sae_lab.runtime.memory import keep_freed_memory, release_fragments

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")]


def grow(release: bool, said) -> None:
    """Allocate and free ever larger blocks, of which each leaves a small one behind it."""
    keep_freed_memory()
    torch.ones(2**24).sum()
    kept, before = [], psutil.Process().memory_info().rss
    for i in range(60):
        block = torch.ones(2**22 + i * 2**16)
        kept.append(torch.ones(2**10))
        del block
        if release:
            release_fragments()
    said.put(psutil.Process().memory_info().rss - before)


def growth(release: bool) -> int:
    said = FORKS.Queue()
    process = FORKS.Process(target=grow, args=(release, said))
    process.start()
    grown = said.get()
    process.join()
    return grown


def test_fragments_are_released():
    whole = growth(release=False)
    assert whole > 1.2e9
    assert growth(release=True) < whole / 2
