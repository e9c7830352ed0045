"""Many workers harvest into one cache: whoever comes, goes or dies, its files are those of one worker."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import fsspec
import pytest
import torch
from fakes import Follow
from test_cache import cached, files, harvester

from sae_lab.cache import claims
from sae_lab.cache import worker as harvesting
from sae_lab.cache.claims import Claims
from sae_lab.cache.progress import name_of
from sae_lab.cache.ranges import Ranges, choose_free
from sae_lab.cache.shards import Shard
from sae_lab.cache.store import Store
from sae_lab.runtime.errors import SafeStop, UserError

CONTEXT = get_context("fork")


class Slow(Follow):
    """A language model that takes its time, so that workers meet."""

    def activations(self, tokens):
        time.sleep(0.002)
        return super().activations(tokens)


def writer(path, n_tokens: int, **data):
    made = harvester(path, n_tokens, lm=Slow(), **({"n_documents": 200} | data))
    made.files.shard_tokens = made.files.key["shard_tokens"] = 30
    made.lost_after = 5.0
    return made


def of_one_worker(folder: Path, n_tokens: int, **data) -> dict[str, bytes]:
    writer(folder, n_tokens, **data).build()
    return files(folder)


@contextmanager
def stopping_after(n: int) -> Iterator[None]:
    """Send this process SIGTERM while it computes its n-th shard, which it then writes."""
    begun, real = [], harvesting.gather

    def gather(*args):
        begun.append(args)
        if len(begun) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(harvesting, "gather", gather)
        yield


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
    ours, theirs = (cached(path, Slow(), copies_gb=0.0).stream for path in (tmp_path / "alone", "s3://bucket/cache"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(
        UserError, match=r"s3://none/cache/progress cannot be written \(The specified bucket does not exist\): check"
    ):
        writer("s3://none/cache", 300).build()


@pytest.mark.parametrize(
    "data", [{"order": "as_read"}, {"pack": False}, {"exclude_first": 2, "exclude_tokens": [7, 50]}]
)
def test_whoever_comes_first_the_shards_are_the_same(data, tmp_path):
    """A worker that jumps into the text, as beside another one, and one that reads it from the beginning."""
    whole = of_one_worker(tmp_path / "alone", 300, **data)
    first = writer(tmp_path / "cache", 300, **data)
    with Claims(first.store.within("progress"), 5.0) as others:
        first._begin(others)
        for i in (0, 1, 4):
            assert others.take(name_of(i))
        with pytest.raises(SafeStop), stopping_after(5):
            writer(tmp_path / "cache", 300, **data).build()
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 5
    assert not (tmp_path / "cache" / "shard-00001.safetensors").exists()
    writer(tmp_path / "cache", 300, **data).build()
    assert files(tmp_path / "cache") == whole


# ---- claims


def test_a_claim_that_does_not_change_is_taken_over_by_the_clock_of_who_looks(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(claims.time, "time", lambda: pytest.fail("the clocks of two machines need not agree"))
    store = Store(tmp_path)
    other = json.dumps({"host": "elsewhere", "pid": 1, "started": 1e12, "beat": 0}).encode()
    store.write("00003.claim", other)
    ours = Claims(store, 60.0)
    assert not ours.take("00003")
    now[0] += 59
    assert not ours.take("00003")
    store.write("00003.claim", other.replace(b": 0}", b": 1}"))  # renewed
    now[0] += 59
    assert not ours.take("00003")
    now[0] += 61
    assert ours.take("00003")
    ours.release("00003")
    assert ours.take("00003")
    assert not Claims(store, 60.0).take("00003")  # of this process, which lives


@pytest.mark.process
def test_a_claim_of_a_process_of_this_machine_that_has_ended_is_taken_over_at_once(tmp_path):
    ended = CONTEXT.Process(target=Claims(Store(tmp_path), 60.0).take, args=("00003",))
    ended.start()
    ended.join()
    assert (tmp_path / "00003.claim").exists()
    assert Claims(Store(tmp_path), 60.0).take("00003")


def test_a_claim_is_renewed_while_it_is_held_and_not_after(tmp_path):
    file = tmp_path / "00003.claim"
    with Claims(Store(tmp_path), 0.05) as ours:
        assert ours.take("00003")
        first = file.read_bytes()
        while file.read_bytes() == first:
            time.sleep(0.005)
        ours.release("00003")
        assert not file.exists()
        assert ours.take("00004")
    assert not list(tmp_path.iterdir())


# ---- mistakes


def test_a_stopped_worker_leaves_no_claim_and_a_damaged_record_is_named(tmp_path):
    with pytest.raises(SafeStop), stopping_after(2):
        writer(tmp_path / "cache", 300).build()
    progress = tmp_path / "cache" / "progress"
    assert sorted(path.name for path in progress.iterdir()) == ["00000.json", "00001.json"]
    (progress / "00001.json").write_text("{}")
    with pytest.raises(UserError, match=r"progress/00001.json is damaged \(KeyError\): delete it, and the same"):
        writer(tmp_path / "cache", 300).build()
    (progress / "00001.json").unlink()
    (tmp_path / "cache" / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged or missing files \(shard-00000.safetensors\): rewrite them with"):
        writer(tmp_path / "cache", 300).verify()
    writer(tmp_path / "cache", 300).build(rebuild=True)
    assert files(tmp_path / "cache") == of_one_worker(tmp_path / "alone", 300)


def test_another_size_of_shards_is_another_cache(tmp_path):
    writer(tmp_path, 300).build()
    with pytest.raises(UserError, match=r"shard_tokens is 30 in the cache and 200 here"):
        harvester(tmp_path, 300, lm=Slow(), n_documents=200).build()


def test_a_missing_package_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://bucket needs a package that is not installed: type pip install s3fs\."):
        Store("s3://bucket")


def test_shards_that_leave_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"max_norm leave out all 40 tokens of shard-0000.*raise shard_tokens=30"):
        writer(tmp_path, 300, exclude_tokens=[*range(10_000)]).build()
