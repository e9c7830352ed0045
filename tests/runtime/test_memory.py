"""Memory that is freed in pieces of changing sizes."""

import multiprocessing
import sys

import psutil
import pytest
import torch

from sae_lab.runtime.memory import keep_freed_memory, release_fragments

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")]


def grow(said) -> None:
    """Allocate and free ever larger blocks, of which each leaves a small one behind it: 1.4 GB if none is released."""
    keep_freed_memory()
    torch.ones(2**24).sum()
    kept, before = [], psutil.Process().memory_info().rss
    for i in range(60):
        block = torch.ones(2**22 + i * 2**16)
        kept.append(torch.ones(2**10))
        del block
        release_fragments()
    said.put(psutil.Process().memory_info().rss - before)


def test_fragments_are_released():
    spawn = multiprocessing.get_context("spawn")  # a fresh heap
    said = spawn.Queue()
    process = spawn.Process(target=grow, args=(said,))
    process.start()
    grown = said.get()
    process.join()
    assert grown < 0.5e9
