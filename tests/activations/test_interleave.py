"""Chunks launched between training steps: no row and no state changes, and each step launches its share.

On a CPU a chunk is computed where it is launched, so everything but the streams of a GPU is tested here.
"""

import math
from functools import partial
from threading import Lock

import pytest
import torch
from fakes import SETTINGS, Echo, Numbers, data
from test_buffer import Counter, assert_state_is_exact, numbers

from sae_lab.activations import workers
from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Chunk, Launched, LMSource, SharedSource
from sae_lab.lm import TransformersLM
from sae_lab.runtime import signals
from sae_lab.runtime.errors import SafeStop, UserError

CPU = torch.device("cpu")
BLOCK, BATCH = 20, 4


class Launches(Counter):
    """A source of numbered rows that records which chunks were launched; chunk `broken` cannot be."""

    n_at_once = 1

    def __init__(self, n_chunks: int = 13, broken: int = 10**9):
        super().__init__(n_chunks)
        self.broken, self.launched = broken, []

    def launch(self):
        for chunk in iter(self):
            self.launched.append(len(chunk.rows))
            if chunk.state["chunk"] == self.broken:
                raise ZeroDivisionError("chunk 7")
            yield Launched(chunk, None)


class Even(Launches):
    SIZES = (4,) * 5


def stream(source=None, n_rows=None, block_rows=BLOCK) -> ShuffledBlocks:
    ahead = InterleavedSource(source or Launches(), CPU)
    return ShuffledBlocks(SharedSource(ahead), block_rows, BATCH, 3, n_rows, ahead.prepare)


def plain(block_rows=BLOCK) -> ShuffledBlocks:
    return ShuffledBlocks(Counter(13), block_rows, BATCH, seed=3)


@pytest.mark.parametrize("n_rows", [None, 1, 40, 50])
@pytest.mark.parametrize("block_rows", [4, 20, 1000])
def test_no_row_changes(block_rows, n_rows):
    """Also where more is asked for than the run takes; only the batch with its last row ends there."""
    expected = [batch.flatten().tolist() for batch in plain(block_rows)]
    if n_rows is not None and n_rows % BATCH:
        expected[n_rows // BATCH] = expected[n_rows // BATCH][: n_rows % BATCH]
    assert [batch.flatten().tolist() for batch in stream(None, n_rows, block_rows)] == expected


def test_the_state_is_exact_at_any_moment():
    assert_state_is_exact(plain, stream)


def test_a_closed_stream_goes_on_where_it_was():
    closed, got = stream(), []
    for batch in closed:
        got += numbers([batch])
        closed.close()
    assert got == numbers(plain())


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_each_batch_launches_its_share_of_the_next_block(resumed_at):
    """Ten batches of a block launch ten chunks of the next one, evenly also if the block is entered in its middle."""
    batches = stream(Even(100), block_rows=40)
    if resumed_at:
        before = stream(Even(100), block_rows=40)
        for _ in range(resumed_at):
            next(before)
        batches.load_state_dict(before.state_dict())
    source, left = batches.source.source.source, 10 - resumed_at
    for i in range(1, left + 1):
        next(batches)
        assert len(source.launched) == 10 + math.ceil(40 * i // left / 4)
    next(batches)
    assert len(source.launched) == 20 + 1


def test_a_long_step_launches_several_chunks_and_a_short_one_none():
    batches = ShuffledBlocks(ahead := InterleavedSource(Even(100), CPU), 16, 8, 0, None, ahead.prepare)
    launched = ahead.source.launched
    assert [(next(batches), len(launched))[1] for _ in range(4)] == [6, 8, 10, 12]
    big = Launches(100)
    big.SIZES = (16,) * 5
    batches = ShuffledBlocks(ahead := InterleavedSource(big, CPU), 32, 4, 0, None, ahead.prepare)
    assert [(next(batches), len(big.launched))[1] for _ in range(9)] == [3, 3, 3, 3, 4, 4, 4, 4, 5]


@pytest.mark.parametrize("n_rows", [3, 20, 21, 40, 55])
def test_nothing_is_harvested_beyond_the_last_block(n_rows):
    batches = stream(Even(100), n_rows)
    for _ in range(-(-n_rows // BATCH)):
        next(batches)
    assert sum(batches.source.source.source.launched) == -(-n_rows // BLOCK) * BLOCK


@pytest.mark.parametrize("n_rows", [3, 20, 21, 40, 55])
def test_the_thread_harvests_nothing_beyond_the_last_block(n_rows):
    source = Even(100)
    ahead = PrefetchedSource(source, 0, CPU)
    batches = ShuffledBlocks(ahead, BLOCK, BATCH, 3, n_rows, ahead.prepare)
    for _ in range(-(-n_rows // BATCH)):
        next(batches)
    batches.close()
    assert source.reads * 4 == -(-n_rows // BLOCK) * BLOCK


def test_an_exception_arrives_as_itself_where_its_chunk_would_have():
    """Although the chunk was launched while the block before it was given."""
    whole, failing, got = numbers(plain()), stream(Launches(broken=7)), []
    with pytest.raises(ZeroDivisionError, match="chunk 7"):
        got.extend(failing)
    got = numbers(got)
    assert got == whole[: len(got)]
    assert len(got) == 5  # 39 rows come before chunk 7: one block is whole


class ReceivesAfter:
    """A recorder of signals that receives one when n chunks are launched."""

    together = False

    def __init__(self, n: int, source):
        self.n, self.source = n, source

    @property
    def received(self):
        return signals.signal.SIGTERM if len(self.source.launched) >= self.n else None


def test_a_stop_comes_between_two_chunks_and_loses_no_row(monkeypatch):
    whole = numbers(plain())
    for n_launched in range(1, 13):
        batches, got = stream(), []
        source = batches.source.source.source

        monkeypatch.setattr(signals, "_recorder", ReceivesAfter(n_launched, source))
        with pytest.raises(SafeStop):
            got.extend(batches)
        assert len(source.launched) == n_launched
        monkeypatch.undo()
        resumed = stream()
        resumed.load_state_dict(batches.state_dict())
        assert numbers(got) + numbers(resumed) == whole


def test_the_rows_of_a_language_model_are_the_same_to_the_bit():
    """Unprefetched, in a thread and interleaved, with positions left out."""
    lm = TransformersLM("tiny", ["transformer.h.2"], device="cpu")
    settings = SETTINGS | {"n_tokens": 200, "block_tokens": 64, "seq_len": 16, "batch_size": 8, "exclude_bos": True}

    def of(**changes) -> ActivationData:
        return from_documents(lm, partial(Numbers, n_documents=20), order="shuffled", **(settings | changes))

    sequential, threaded, between = of(), of(prefetch=True), of(prefetch=True)
    ahead = InterleavedSource(between.source(), CPU)
    between.stream = ShuffledBlocks(SharedSource(ahead), 64, 8, between.seed, between.n_tokens, ahead.prepare)
    expected = torch.cat(list(sequential.train_dataloader()))
    assert len(expected) == 200
    for d in (threaded, between):
        assert torch.equal(torch.cat(list(d.train_dataloader())), expected)
        d.stream.close()


def test_activations_that_are_not_finite_never_reach_a_batch():
    """They are found when their chunk is handed over, after it was launched and before anything is computed from it."""
    d, compute = data(block_tokens=16, n_tokens=200), Echo.activations
    d.lm.activations = lambda tokens: compute(d.lm, tokens).masked_fill((tokens == 161)[..., None, None], torch.nan)
    ahead = InterleavedSource(d.source(), CPU)
    batches, got = ShuffledBlocks(SharedSource(ahead), 16, 4, 0, None, ahead.prepare), []
    with pytest.raises(UserError, match=r"activations of a are not finite in 1 of 12 rows.*check its weights"):
        got.extend(batches)
    assert got
    assert all(batch.isfinite().all() for batch in got)


@pytest.mark.parametrize("sites", [["transformer.h.2"], ["transformer.h.1", "transformer.h.4.attn"]])
def test_a_pass_asks_nothing_of_the_gpu(sites, monkeypatch):
    """Taken with tensors that hold no numbers: a question to the GPU would be an error. The rows are the right ones."""
    lm = TransformersLM("tiny", sites, device="cpu")
    tokens = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    for keep in (tokens % 3 > 0, tokens >= 0):
        found = workers.launch_activations(lm, tokens, keep).wait()
        assert torch.equal(found, lm.activations(tokens)[keep])
        with monkeypatch.context() as patched:
            patched.setattr(
                workers, "FiniteCheck", lambda rows, *rest: torch.stack(torch.aminmax(rows)) + 0 * rows[:2, 0, 0]
            )
            lm.model.to("meta")
            assert workers.launch_activations(lm, tokens, keep).is_meta
        lm = TransformersLM("tiny", sites, device="cpu")


def test_handing_over_waits_for_the_chunk_and_keeps_its_memory(monkeypatch):
    """What a GPU would be told, in order."""
    told = []

    class Rows:
        is_cuda, device = True, "cuda:1"

        def __len__(self):
            return 4

        def record_stream(self, stream):
            told.append(f"keep for {stream}")

    class Check:
        rows = Rows()

        def wait(self):
            told.append("wait")
            return self.rows

    class Source:
        n_at_once = 1

        def launch(self):
            for i in range(2):
                told.append("launch")
                yield Launched(Chunk({"chunk": i}, Check.rows), Check())

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"main of {device}")
    ahead = InterleavedSource(Source(), CPU)
    chunks = iter(ahead)
    next(chunks)
    ahead.prepare(4, 4)
    ahead.prepare(4, 4)
    next(chunks)
    assert told == ["launch", "wait", "keep for main of cuda:1", "launch", "wait", "keep for main of cuda:1"]


def test_a_lock_is_free_between_launches():
    """So that a validation may run the language model."""
    d = data()
    lock = Lock()
    ahead = InterleavedSource(LMSource(d.lm, d.text.rows("train", True), d.positions.mask, 2, lock, lock), CPU)
    chunks = iter(ahead)
    next(chunks)
    ahead.prepare(100, 100)
    assert not lock.locked()
    chunks.close()
