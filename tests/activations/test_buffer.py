"""Shuffled blocks: every row once, the same after any resume."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.source import Chunk


class Counter:
    """A source whose rows are their own numbers, in chunks of uneven sizes (some empty)."""

    SIZES = (7, 0, 12, 3, 10)

    def __init__(self, n_chunks: int):
        self.n_chunks, self.chunk, self.reads = n_chunks, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"chunk": self.chunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chunk = state["chunk"]

    def __iter__(self) -> Iterator[Chunk]:
        while self.chunk < self.n_chunks:
            first = sum(self.SIZES[i % 5] for i in range(self.chunk))
            rows = torch.arange(first, first + self.SIZES[self.chunk % 5]).float().view(-1, 1, 1)
            state = {"chunk": self.chunk}
            self.chunk += 1
            self.reads += 1
            yield Chunk(state, rows)


def assert_state_is_exact(plain, ahead) -> None:
    """Two makers of streams: one that prefetches has the state of a plain one after every batch, and resumes there."""
    unprefetched = plain()
    states = [unprefetched.state_dict()] + [unprefetched.state_dict() for _ in unprefetched]
    whole, prefetched = numbers(plain()), ahead()
    for given, state in enumerate(states):
        assert prefetched.state_dict() == state
        resumed = ahead()
        resumed.load_state_dict(prefetched.state_dict())
        assert numbers(resumed) == whole[given:]
        next(prefetched, None)


def numbers(batches) -> list[list[int]]:
    return [batch.flatten().int().tolist() for batch in batches]


@pytest.mark.parametrize(("block_rows", "batch_size"), [(20, 4), (64, 8), (4, 4), (3, 5), (1000, 6)])
def test_every_row_comes_once(block_rows, batch_size):
    batches = numbers(ShuffledBlocks(Counter(11), block_rows, batch_size, seed=0))
    n = sum(Counter.SIZES) * 2 + Counter.SIZES[0]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[: n // batch_size])


def test_rows_stay_in_their_block_and_are_mixed_in_it():
    batches = numbers(ShuffledBlocks(Counter(10), 32, 8, seed=0))
    first_block = [i for batch in batches[:4] for i in batch]
    assert sorted(first_block) == list(range(32))
    assert first_block != sorted(first_block)


def test_the_seed_decides_the_order():
    orders = [numbers(ShuffledBlocks(Counter(10), 32, 8, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("block_rows", "batch_size"), [(20, 4), (7, 7), (64, 8), (12, 5)])
def test_a_resumed_stream_continues_exactly(block_rows, batch_size):
    whole = numbers(ShuffledBlocks(Counter(13), block_rows, batch_size, seed=3))
    for given in range(len(whole) + 1):
        stream = ShuffledBlocks(Counter(13), block_rows, batch_size, seed=3)
        for _ in range(given):
            next(stream)
        resumed = ShuffledBlocks(Counter(13), block_rows, batch_size, seed=3)
        resumed.load_state_dict(stream.state_dict())
        assert numbers(resumed) == whole[given:]


def test_resuming_reads_only_from_its_own_block_on():
    stream = ShuffledBlocks(Counter(1000), 64, 8, seed=0)
    for _ in range(8 * 20 + 3):
        next(stream)
    source = Counter(1000)
    resumed = ShuffledBlocks(source, 64, 8, seed=0)
    resumed.load_state_dict(stream.state_dict())
    assert numbers([next(resumed)]) == numbers([next(stream)])
    assert source.reads <= 64 // 6 + 2


def test_a_used_stream_can_go_back_to_its_beginning():
    stream = ShuffledBlocks(Counter(10), 16, 8, seed=0)
    beginning = stream.state_dict()
    whole = numbers(stream)
    stream.load_state_dict(beginning)
    assert numbers(stream) == whole


def test_state_is_plain():
    stream = ShuffledBlocks(Counter(10), 16, 8, seed=0)
    next(stream)
    assert stream.state_dict() == {"chunk": {"chunk": 0}, "skip": 0, "block": 0, "given": 1}


class Rows(Counter):
    """Chunks of one megabyte."""

    def __iter__(self) -> Iterator[Chunk]:
        while self.chunk < self.n_chunks:
            yield Chunk(self.state_dict(), torch.zeros(2**10, 1, 2**8))
            self.chunk += 1


MEMORY_OF_TWO_STREAMS = """
import psutil
from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.runtime.memory import keep_freed_memory
from test_buffer import Rows

keep_freed_memory()
held, kept = [psutil.Process().memory_info().rss], []
for _ in range(2):
    stream = ShuffledBlocks(Rows(n_chunks=256), block_rows=2**18, batch_size=2**10, seed=0)
    next(stream)
    kept.append(bytes(2**20))  # what else is allocated meanwhile
    held.append(psutil.Process().memory_info().rss)
    stream.close()
    held.append(psutil.Process().memory_info().rss)
print(*[round((after - held[0]) / 2**20) for after in held[1:]])
"""


@pytest.mark.process
def test_a_block_gives_its_memory_back():
    """A second stream's block (256 MB) comes after the first's, not on top of it."""
    said = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_TWO_STREAMS], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    first, closed, second, again = (int(mb) for mb in said.stdout.split())
    assert 256 <= first < 256 + 64
    assert 256 <= second < 256 + 64
    assert max(closed, again) < 64


def test_a_block_says_how_full_it_is():
    """Of 7 + 12 + 1 rows, then 2 + 10: what is filled, what is ready, and how long it took."""
    stream, told, ready = ShuffledBlocks(Counter(5), block_rows=20, batch_size=5, seed=0), [], []
    stream.filling.watch = lambda rows, of: told.append((rows, of))
    for _ in stream:
        ready.append(stream.n_rows_left)
    assert told == [(7, 20), (19, 20), (20, 20), (2, 20), (12, 20)]
    assert ready == [15, 10, 5, 0, 10, 5, 0]
    assert stream.filling.seconds > 12 * stream.filling.seconds_per_row > 0  # of both blocks; of the last one's 12 rows
