"""A shard is written while the next one is computed: what is shown, claimed, stopped and raised meanwhile."""

import os
import shutil
import signal
import threading
from concurrent.futures import wait
from itertools import count, pairwise

import pytest
from test_cache import files, harvester
from test_many_workers import of_one_worker, stopping_after, writer

from sae_lab.cache import files as cache_files
from sae_lab.cache import worker as harvesting
from sae_lab.cache.background import BackgroundWriter
from sae_lab.cache.claims import Claims
from sae_lab.cache.progress import Progress, name_of
from sae_lab.runtime import signals
from sae_lab.runtime.errors import Interrupted, SafeStop, UserError
from sae_lab.runtime.screen import TokenProgress

N = 300


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    return of_one_worker(tmp_path_factory.mktemp("alone") / "cache", N)


@pytest.fixture
def last(whole) -> int:
    """The number of the last shard."""
    return sum(name.startswith("shard") for name in whole) - 1


@pytest.fixture
def before(monkeypatch):
    """Let a function of a class or a module first call another one with the same arguments."""

    def before(owner, name, first):
        real = getattr(owner, name)

        def both(*args):
            first(*args)
            return real(*args)

        monkeypatch.setattr(owner, name, both)

    return before


@pytest.fixture
def begun(before) -> list[threading.Event]:
    """What is set when the first, the second, ... shard begins to be computed."""
    events, numbers = [threading.Event() for _ in range(20)], count()
    before(harvesting, "gather", lambda *_: events[next(numbers)].set())
    return events


def test_the_next_shard_is_computed_while_one_is_written_and_no_other(
    tmp_path, monkeypatch, before, begun, whole, last
):
    events, write = [], BackgroundWriter._write

    def write_late(self, i, *args):
        assert i == last or begun[i + 1].wait(60)
        shard = write(self, i, *args)
        events.append("write")
        return shard

    before(harvesting, "gather", lambda *_: events.append("gather"))
    monkeypatch.setattr(BackgroundWriter, "_write", write_late)
    writer(tmp_path, N).build()
    assert files(tmp_path) == whole
    assert events == ["gather", *["gather", "write"] * last, "write"]


def test_a_shard_that_is_being_written_stays_claimed_and_counted(tmp_path, before, begun, last):
    claimed, shown = [], []

    def note_claim(_, i, *__):
        claimed.append((i, (tmp_path / "progress" / f"{name_of(i)}.claim").exists()))

    def write_late(self, i, *args):
        assert i == last or begun[i + 1].wait(60)
        note_claim(self, i)

    before(BackgroundWriter, "_write", write_late)
    before(Progress, "add", note_claim)
    before(TokenProgress, "advance", lambda bar, n: shown.append(bar.done + n))
    writer(tmp_path, N).build()
    assert sorted(claimed) == [(i, True) for i in range(last + 1) for _ in ("written", "recorded")]
    assert all(a <= b for a, b in pairwise(shown))
    assert shown[-1] >= N


def test_a_second_signal_waits_for_no_write(tmp_path, monkeypatch, before, whole):
    """The first one arrives while the first shard is computed, the second one while it is written."""
    waiting, written, threads = threading.Event(), threading.Event(), []

    def write(*_):
        threads.append(threading.current_thread())
        assert waiting.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        written.wait(60)

    monkeypatch.setattr(signals, "ECHO", -1.0)
    before(BackgroundWriter, "finish_after_error", lambda _: waiting.set())
    before(BackgroundWriter, "_write", write)
    with pytest.raises(Interrupted, match="at once by a second signal"), stopping_after(1):
        writer(tmp_path, N).build()
    (thread,) = threads
    assert thread.is_alive()
    assert thread.daemon  # the end of the process does not wait for it either
    assert not list(tmp_path.glob("progress/*"))
    written.set()
    thread.join()
    monkeypatch.undo()
    writer(tmp_path, N).build()
    assert files(tmp_path) == whole


@pytest.mark.parametrize("stopped", [False, True])
def test_an_error_of_a_write_does_not_replace_the_one_that_came_first(stopped, tmp_path, before, caplog):
    over, computed = threading.Event(), count()

    def full_disk(*_):
        assert over.wait(60)
        raise UserError("the disk is full")

    def compute(*_):
        if next(computed) == 1:
            raise UserError("activations are NaN")
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    before(harvesting, "gather", compute)
    before(BackgroundWriter, "finish_after_error", lambda _: over.set())
    before(BackgroundWriter, "_write", full_disk)
    with pytest.raises(SafeStop if stopped else UserError, match=r"SIGTERM|NaN"):
        writer(tmp_path, N).build()
    assert "The shard before could not be written either: the disk is full" in caplog.text
    assert not list(tmp_path.glob("progress/*.claim"))


def test_a_write_that_fails_is_noticed_while_the_next_shard_is_computed(tmp_path, before, monkeypatch):
    counted, gather = [], harvesting.gather

    def full_disk(*_):
        raise UserError("the disk is full")

    def late(data, rows, advance):
        background = advance.__self__.writer

        def count_and_check(n):
            counted.append(bool(background.rows))
            if background.rows:
                wait([background._shard])
            advance(n)

        return gather(data, rows, count_and_check)

    monkeypatch.setattr(harvesting, "gather", late)
    before(BackgroundWriter, "_write", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        writer(tmp_path, N).build()
    assert counted.count(False) > 1
    assert counted.count(True) == 1  # of as many chunks
    assert not list(tmp_path.glob("progress/*.claim"))


def test_a_worker_that_loses_a_race_for_a_claim_chooses_another_shard_and_does_not_wait(tmp_path, before, begun, whole):
    made = writer(tmp_path, N)
    other = Claims(made.store.within("progress"), 60.0)
    released, taken = [], []

    def race(claims, name):
        if claims is not other and not taken and name == name_of(1):
            taken.append(other.take(name))

    def write_late(_, i, *__):
        if i == 0:
            assert begun[1].wait(60)
            other.release(name_of(1))
            released.append(i)

    before(Claims, "take", race)
    before(BackgroundWriter, "_write", write_late)
    made.build()
    assert taken == [True]
    assert released == [0]
    assert files(tmp_path) == whole


def test_a_worker_goes_on_with_nothing_when_others_have_ended_the_harvest_while_it_wrote(
    tmp_path, before, begun, whole
):
    def end(*_):
        assert begun[1].wait(60)
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content)
        shutil.rmtree(tmp_path / "progress")
        raise UserError("its file is gone")

    before(BackgroundWriter, "_write", end)
    assert writer(tmp_path, N).build().complete
    assert not begun[2].is_set()
    assert files(tmp_path) == whole


def test_a_worker_does_not_take_over_the_shard_that_it_writes(tmp_path, monkeypatch, before, last, whole):
    """Its claim may look lost, if it could not be renewed."""
    computed, waiting = count(), threading.Event()
    before(BackgroundWriter, "_write", lambda _, i, *__: i < last or waiting.wait(60))
    before(BackgroundWriter, "finish", lambda background: waiting.set() if last in background.rows else None)
    before(harvesting, "gather", lambda *_: next(computed))
    monkeypatch.setattr(Claims, "is_lost", lambda *_: True)
    writer(tmp_path, N).build()
    assert next(computed) == last + 1
    assert files(tmp_path) == whole


@pytest.mark.parametrize(("dtype", "stored"), [("float32", 3 * 4), ("bfloat16", 3 * 2), ("int8", 3 + 4)])
def test_the_memory_of_two_shards_and_a_write_is_checked(dtype, stored, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(cache_files, "check_memory_of", lambda _, n_bytes, __: checked.append(n_bytes))
    made = harvester(tmp_path, 10_000, dtype)
    assert (len(made.files.data.lm.sites), made.files.data.d_in) == (2, 3)
    assert checked == [200 * 2 * (2 * 3 * 4 + 3 * stored)]
