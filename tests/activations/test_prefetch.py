"""Reading ahead changes no row and no state, keeps its bound, passes on exceptions, and never holds up an exit."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_buffer import Counter, assert_state_is_exact, numbers

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Chunk
from sae_lab.lm import TransformersLM
from sae_lab.runtime.threads import one_thread

CPU = torch.device("cpu")


def stream(n_chunks: int = 13, ahead: int = 0, block_rows: int = 20) -> ShuffledBlocks:
    source = PrefetchedSource(Counter(n_chunks), ahead, CPU)
    return ShuffledBlocks(source, block_rows, 4, 3, None, source.prepare)


@pytest.mark.parametrize("ahead", [0, 1, 30, 1000])
@pytest.mark.parametrize("block_rows", [4, 20, 1000])
def test_no_row_changes(ahead, block_rows):
    assert numbers(stream(ahead=ahead, block_rows=block_rows)) == numbers(
        ShuffledBlocks(Counter(13), block_rows, 4, seed=3)
    )


def test_the_state_is_exact_at_any_moment():
    assert_state_is_exact(lambda: ShuffledBlocks(Counter(13), 20, 4, seed=3), stream)


def test_a_closed_stream_goes_on_where_it_was():
    whole, closed = numbers(stream()), stream()
    got = []
    for batch in closed:
        got += numbers([batch])
        closed.close()
    assert got == whole
    assert prefetching() == []


def prefetching() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


class Recorder(Counter):
    """Counts what was drawn; chunk `broken` cannot be."""

    drawn = 0

    def __init__(self, broken: int = 10**9):
        super().__init__(1000)
        self.broken = broken

    def __iter__(self):
        for chunk in super().__iter__():
            self.drawn += 1
            if chunk.state["chunk"] == self.broken:
                raise ZeroDivisionError("chunk 7")
            yield chunk


def test_no_more_than_the_bound_is_read_ahead():
    source, taken = Recorder(), 0
    chunks = iter(PrefetchedSource(source, 20, CPU))
    for _ in range(30):
        taken += len(next(chunks).rows)
        time.sleep(0.002)
        assert sum(source.SIZES[i % 5] for i in range(source.drawn - 1)) < taken + 20
    chunks.close()
    assert prefetching() == []


def test_only_what_is_wanted_is_read():
    source, seen = Recorder(), []
    ahead = PrefetchedSource(source, 0, CPU)
    chunks = iter(ahead)
    for rows in (0, 8, 20, 0):
        next(chunks)
        ahead.prepare(0, rows)
        time.sleep(0.02)
        seen.append(source.drawn)
    assert seen == [1, 3, 6, 6]  # rows of the chunks: 7, 0, 12, 3, 10, 7
    chunks.close()


def test_an_exception_arrives_as_itself_where_its_chunk_would_have():
    chunks, taken = iter(PrefetchedSource(Recorder(broken=7), 100, CPU)), []
    with pytest.raises(ZeroDivisionError, match="chunk 7"):
        taken.extend(chunk.state["chunk"] for chunk in chunks)
    assert taken == list(range(7))
    assert prefetching() == []


def test_the_thread_computes_with_as_many_threads_as_the_reader():
    seen = []

    class Asks(Counter):
        def __iter__(self):
            for chunk in super().__iter__():
                seen.append(torch.get_num_threads())
                yield chunk

    torch.set_num_threads(2)
    try:
        chunks = PrefetchedSource(Asks(50), 2, CPU)
        for _ in chunks:
            with one_thread():
                time.sleep(0.001)
        assert set(seen) == {2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_language_models_bits_are_the_same_in_the_thread():
    lm = TransformersLM("tiny", ["transformer.h.2"], device="cpu")
    tokens = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))

    class OneRow:
        def load_state_dict(self, state): ...

        def __iter__(self):
            yield Chunk({}, lm.activations(tokens))

    chunk = next(iter(PrefetchedSource(OneRow(), 1, CPU)))
    assert torch.equal(chunk.rows, lm.activations(tokens))
    assert not chunk.rows.is_inference()


@pytest.mark.process
def test_a_process_ends_while_the_thread_reads():
    program = """
import sys, torch
sys.path[:0] = ["tests", "tests/activations"]
from test_prefetch import CPU, PrefetchedSource, Recorder
class Slow(Recorder):
    def __iter__(self):
        for chunk in super().__iter__():
            torch.randn(300, 300) @ torch.randn(300, 300)
            yield chunk
chunks = iter(PrefetchedSource(Slow(), 500, CPU))
next(chunks)
sys.exit(3)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=100, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
