"""Many workers harvest into one cache: whoever comes, goes or dies, its files are those of one worker."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import fsspec
import pytest
from fakes import Follow
from test_cache import files, harvester

from sae_lab.cache.ranges import Ranges, choose_free
from sae_lab.cache.shards import Shard

CONTEXT = get_context("fork")


class Slow(Follow):
    """A language model that takes its time, so that workers meet."""

    def activations(self, tokens):
        time.sleep(0.002)
        return super().activations(tokens)


def writer(path, n_tokens: int):
    made = harvester(path, n_tokens, lm=Slow(), n_documents=200)
    made.shard_tokens = made.key["shard_tokens"] = 30
    made.lost_after = 0.5
    return made


def of_one_worker(folder: Path, n_tokens: int) -> dict[str, bytes]:
    writer(folder, n_tokens).build()
    return files(folder)


def serve(address: Connection) -> None:
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address.send("http://{}:{}".format(*server.get_host_and_port()))
    threading.Event().wait()


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A server of S3 on this machine, with a bucket, to which the environment leads."""
    ours, theirs = CONTEXT.Pipe()
    server = CONTEXT.Process(target=serve, args=(theirs,))
    server.start()
    env = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    env["AWS_ENDPOINT_URL"] = ours.recv()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in env.items():
            patched.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield
    server.kill()
    server.join()


def work(folder: str, n_tokens: int) -> None:
    writer(folder, n_tokens).build()


def harvest_and_kill(url: str, n_tokens: int, begun: Callable[[], bool]) -> None:
    """Harvest by four workers, of which two are killed at random moments after `begun`."""
    rng = random.Random(0)
    workers = [CONTEXT.Process(target=work, args=(url, n_tokens)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in rng.sample(workers, 2):
        while not begun():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(worker.pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert sorted(worker.exitcode for worker in workers) == [-signal.SIGKILL] * 2 + [0] * 2


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
def test_four_workers_two_of_them_killed_make_the_cache_of_one(tmp_path):
    """The killed ones leave claims and perhaps half a file."""
    folder = tmp_path / "cache"
    harvest_and_kill(str(folder), 900, lambda: len(list(folder.glob("shard-*"))) >= 3)
    assert files(folder) == of_one_worker(tmp_path / "alone", 900)


@pytest.mark.process
@pytest.mark.usefixtures("s3")
def test_so_they_do_in_an_object_store(tmp_path):
    there = fsspec.filesystem("s3")
    harvest_and_kill("s3://bucket/cache", 300, lambda: len(there.glob("bucket/cache/shard-*", refresh=True)) >= 2)
    there.invalidate_cache()
    found = {path.rpartition("/")[2]: there.cat_file(path) for path in there.find("bucket/cache")}
    assert found == of_one_worker(tmp_path / "alone", 300)
