"""Many workers harvest into one cache: whoever comes, goes or dies, its files are those of one worker."""

import os
import random
import signal
import time
from itertools import pairwise
from multiprocessing import get_context

import pytest
from fakes import Follow
from test_cache import files, harvester

from sae_lab.cache.ranges import Ranges, choose_free
from sae_lab.cache.shards import Shard

N = 900
CONTEXT = get_context("fork")


class Slow(Follow):
    """A language model that takes its time, so that workers meet."""

    def activations(self, tokens):
        time.sleep(0.002)
        return super().activations(tokens)


def writer(path, **changes):
    made = harvester(path, N, lm=Slow(), n_documents=200, **changes)
    made.shard_tokens = made.key["shard_tokens"] = 30
    made.lost_after = 0.5
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """The files that one worker makes."""
    folder = tmp_path_factory.mktemp("alone") / "cache"
    writer(folder).build()
    return files(folder)


def work(folder: str, **changes) -> None:
    writer(folder, **changes).build()


def start(n: int, folder, **changes):
    workers = [CONTEXT.Process(target=work, args=(str(folder),), kwargs=changes) for _ in range(n)]
    for worker in workers:
        worker.start()
    return workers


# ---- which worker harvests which shard


def shard(rows: int, text_rows: int) -> Shard:
    return Shard("", rows, text_rows, {}, 0, "")


@pytest.mark.parametrize(("n_tokens", "shard_rows", "row_tokens"), [(600, 29, 7), (1, 5, 3), (100, 1, 10), (70, 10, 7)])
def test_the_ranges_of_text_rows_follow_one_another_and_meet_the_least_that_is_needed(n_tokens, shard_rows, row_tokens):
    ranges = Ranges(n_tokens, shard_rows, row_tokens)
    spans = [ranges.of_shard(i) for i in range(30)]
    assert spans[0].start == 0
    assert all(a.stop == b.start and 0 < len(b) <= shard_rows for a, b in pairwise(spans))
    assert spans[ranges.n_needed({}) - 1].stop == -(-n_tokens // row_tokens)


def test_more_shards_are_needed_only_when_tokens_are_certainly_lacking():
    ranges = Ranges(100, 5, 10)  # shards of 50 tokens, two at least
    assert ranges.n_needed({}) == 2
    assert ranges.n_needed({0: shard(50, 5)}) == 2
    assert ranges.n_needed({0: shard(49, 5)}) == 3
    assert ranges.n_needed({0: shard(49, 5), 1: shard(50, 5), 2: shard(0, 5)}) == 4
    done = {0: shard(49, 5), 1: shard(50, 5), 2: shard(30, 5)}
    assert ranges.is_complete(done)
    assert [part.rows for part in ranges.shards(done)] == [49, 50, 1]
    assert ranges.n_needed({0: shard(49, 5), 1: shard(12, 2)}) == 2  # the text ends there


def test_workers_part_the_free_shards_among_them():
    assert choose_free(100, {}, set()) == 0
    assert choose_free(100, {}, {0}) == 50
    assert choose_free(100, {0}, {1, 50}) in (25, 26, 75)
    assert choose_free(100, {}, {10}) == 55
    assert choose_free(3, {0, 1}, {2}) is None


# ---- to the bit


@pytest.mark.process
def test_four_workers_two_of_them_killed_make_the_cache_of_one(alone, tmp_path):
    """The killed ones leave claims and perhaps half a file, at random moments."""
    rng = random.Random(0)
    workers = start(4, tmp_path / "cache")
    for worker in rng.sample(workers, 2):
        while len(list((tmp_path / "cache").glob("shard-*"))) < 3:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(worker.pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert sorted(worker.exitcode for worker in workers) == [-signal.SIGKILL] * 2 + [0] * 2
    assert files(tmp_path / "cache") == alone
