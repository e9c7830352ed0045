"""Rows of a text without random access: windows of rows, the process that reads ahead, its death, and resuming."""

import json
import os
import signal

import pytest
import torch
from pages import Broken, Pages, WordIds

from sae_lab.runtime.errors import UserError
from sae_lab.text import window_rows
from sae_lab.text.encoding import Encoder
from sae_lab.text.text import Text

BOS, SEQ_LEN = 0, 4


def rows_of(documents=Pages, n_tokens: int = 0, repeat: bool = True, **changes):
    options = {"seq_len": SEQ_LEN, "pack": True, "order": "shuffled", "window_tokens": 40} | changes
    return Text(documents, Encoder(WordIds()), BOS, **options).rows("train", repeat, n_tokens)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(window_rows, "SMALLEST", 10)


def test_a_pass_gives_every_token_once_but_for_unfilled_rows_of_windows():
    rows = rows_of(repeat=False).take(10**6)
    words = [word for word in rows.flatten().tolist() if word != BOS]
    there = [int(word) for window in Pages().windows(0, None) for text in window.texts for word in text.split()]
    assert len(words) == len(set(words))
    assert set(words) < set(there)
    assert len(there) - len(words) < 8 * SEQ_LEN
    assert (rows[:, 0] == BOS).all()


def test_windows_grow_to_the_maximum_and_are_shuffled():
    stream, sizes = rows_of(repeat=False), []
    while len(rows := stream.take(1)):
        if stream.row == 1:
            sizes.append(stream._window.rows.size)
            first = rows
        assert rows.shape == first.shape
    assert sizes[0] < 30
    assert all(40 <= size < 80 for size in sizes[3:-1])
    rows = rows_of(repeat=False).take(10**6)
    assert rows.tolist() != sorted(rows.tolist())
    assert not torch.equal(rows_of(lambda split: Pages(split, seed=1), repeat=False).take(10**6), rows)


def test_a_state_continues_at_every_row_over_three_passes():
    stream, n = rows_of(), len(rows_of(repeat=False).take(10**6))
    whole = stream.take(3 * n)
    assert stream.state_dict()["epoch"] == 2
    assert not torch.equal(whole[:n], whole[n : 2 * n])
    assert sorted(whole[:n].flatten().tolist())[-50:] == sorted(whole[n : 2 * n].flatten().tolist())[-50:]
    stream = rows_of()
    for i in range(0, 3 * n, 5):
        resumed = rows_of()
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        there = whole[i : i + 7]
        assert torch.equal(resumed.take(len(there)), there)
        stream.take(5)


@pytest.mark.parametrize("pack", [True, False])
def test_text_without_rows_is_named(pack):
    with pytest.raises(UserError, match=r"no document fills a row|shorter than one row"):
        rows_of(lambda split: Pages(split, 2), seq_len=60, pack=pack).take(1)
    with pytest.raises(UserError, match=r"hold no text|no document fills"):
        rows_of(lambda split: Pages(split, 0), pack=pack).take(1)


@pytest.mark.process
def test_a_process_reads_ahead_and_changes_nothing():
    alone = rows_of().take(200)
    stream = rows_of(n_tokens=10**6)
    assert torch.equal(torch.cat([stream.take(n) for n in (3, 20, 60, 117)]), alone)
    state = stream.state_dict()
    process = stream._ahead.process
    assert process.is_alive()
    stream.close()
    assert not process.is_alive()
    ahead = rows_of().take(220)[200:]
    assert torch.equal(stream.take(20), ahead)  # it goes on with another process
    stream.close()
    resumed = rows_of(n_tokens=10**6)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.take(20), ahead)
    resumed.close()


@pytest.mark.process
def test_a_reader_that_is_killed_ends_the_run_in_a_sentence_and_loses_nothing():
    whole = rows_of().take(80)
    stream = rows_of(n_tokens=10**6)
    first = stream.take(1)
    state = stream.state_dict()
    os.kill(stream._ahead.process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"the process that reads the text ahead died \(exit code -9\): run the same"):
        stream.take(100)
    stream.close()
    resumed = rows_of(n_tokens=10**6)
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([first, resumed.take(79)]), whole)
    resumed.close()


@pytest.mark.process
def test_an_error_in_the_reader_is_raised_here():
    stream = rows_of(Broken, n_tokens=10**6)
    with pytest.raises(UserError, match="page 6 cannot be read"):
        stream.take(100)
    stream.close()
