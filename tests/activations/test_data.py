"""The stream from text to batches: which positions reach the SAE, how much, and in what order after a resume."""

import threading
from functools import partial

import pytest
import torch
from fakes import SETTINGS, Echo, data

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.runtime.errors import UserError
from sae_lab.text.corpora import FileDocuments


class WordIds:
    """A tokenizer whose id of a word is the number it spells."""

    def __call__(self, text: str, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def ids(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0, 0]]


def rows_of(d: ActivationData) -> torch.Tensor:
    return d.text.rows("train", repeat=False).take(1000)


def test_one_pass_gives_every_position_once():
    d = data(repeat=False, n_tokens=10_000)
    assert sorted(ids(d.train_dataloader())) == sorted(rows_of(d).flatten().tolist())


def test_batches_have_rows_sources_width():
    batches = list(data(repeat=False).train_dataloader())
    assert all(batch.shape == (4, 2, 2) for batch in batches[:-1])


def test_bos_never_reaches_the_sae_when_excluded():
    d = data(exclude_bos=True, repeat=False, n_tokens=10_000)
    tokens = rows_of(d)
    assert (tokens[:, 1:] == 0).any()  # there are BOS inside rows, too
    assert sorted(ids(d.train_dataloader())) == sorted(tokens[tokens != 0].tolist())


def test_first_positions_can_be_left_out():
    d = data(exclude_first=2, repeat=False, n_tokens=10_000)
    assert sorted(ids(d.train_dataloader())) == sorted(rows_of(d)[:, 2:].flatten().tolist())


@pytest.mark.parametrize("n_tokens", [40, 41, 43, 48])
def test_the_budget_is_met_exactly(n_tokens):
    """By the same rows, in the same order, as a longer run; also from the middle on, and at the end of a block."""
    stream = data().stream
    whole = [next(stream) for _ in range(12)]
    d = data(n_tokens=n_tokens)
    batches = list(d.train_dataloader())
    assert d.n_steps == len(d.train_dataloader()) == len(batches) == -(-n_tokens // 4)
    assert torch.equal(torch.cat(batches), torch.cat(whole)[:n_tokens])
    for n in range(d.n_steps):
        resumed, before = data(n_tokens=n_tokens), data(n_tokens=n_tokens)
        for _ in range(n):
            next(before.stream)
        resumed.load_state_dict(before.state_dict())
        assert torch.equal(next(iter(resumed.train_dataloader())), batches[n])


@pytest.mark.parametrize(("n_tokens", "rows"), [(4, 4), (10, 12), (1000, 1000), (1001, 1000), (5000, 1000)])
def test_a_run_shorter_than_a_block_fills_no_more_than_it_needs(n_tokens, rows, monkeypatch):
    """Nor does it run the language model for more; stopped anywhere, it goes on exactly."""
    passes, compute = [], Echo.activations
    monkeypatch.setattr(Echo, "activations", lambda lm, tokens: (passes.append(len(tokens)), compute(lm, tokens))[1])
    d = data(block_tokens=1000, n_tokens=n_tokens)
    batches = [next(iter(d.train_dataloader()))]
    assert d.stream.block_rows == rows
    assert sum(passes) * 6 - rows < 2 * 6  # less than a pass of two text rows of six tokens more
    batches += list(d.train_dataloader())
    assert sum(map(len, batches)) == n_tokens
    for batch, again in zip(batches, d.calibration_batches(5), strict=False):
        assert torch.equal(again[: len(batch)], batch)
    for n in range(min(d.n_steps, 5)):
        resumed, before = (data(block_tokens=1000, n_tokens=n_tokens) for _ in range(2))
        for _ in range(n):
            next(before.stream)
        resumed.load_state_dict(before.state_dict())
        assert torch.equal(next(iter(resumed.train_dataloader())), batches[n])


def test_held_out_rows_come_from_other_documents():
    d = data()
    held_out = d.held_out_rows(18)
    assert held_out.shape == (3, 6)
    assert ((held_out >= 1100) | (held_out == 0)).all()
    assert (rows_of(d) < 1100).all()
    assert torch.equal(held_out, d.held_out_rows(18))


def test_validation_batches_hold_the_held_out_rows():
    d = data()
    assert sorted(ids(d.val_dataloader())) == sorted(d.held_out_rows(12).flatten().tolist())


def test_calibration_repeats_the_first_training_batches_and_moves_nothing():
    d = data()
    first = [next(d.stream) for _ in range(3)]
    state = d.state_dict()
    again = list(d.calibration_batches(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert d.state_dict() == state
    assert len(list(d.calibration_batches(100))) == d.n_steps


def test_prefetch_changes_no_batch_and_validation_may_run_beside_it():
    plain, ahead = data(), data(prefetch=True)
    for _ in range(100):
        batch = next(plain.stream)
        assert torch.equal(next(ahead.stream), batch)
        ahead.held_out_rows(18)
    ahead.teardown("fit")
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    assert not data(prefetch="auto").prefetch  # on a CPU


def test_a_resumed_stream_continues_exactly_across_passes():
    stream = data(n_documents=3).stream
    whole = [next(stream) for _ in range(30)]  # several passes over three short documents
    for n in range(30):
        before = data(n_documents=3)
        for _ in range(n):
            next(before.stream)
        after = data(n_documents=3)
        after.load_state_dict(before.state_dict())
        assert torch.equal(next(after.stream), whole[n])


def test_a_stream_does_not_go_on_with_other_text_or_through_another_model(tmp_path):
    """Nor by a change behind the first rows; from a checkpoint that names no origin it does."""

    def of_files() -> ActivationData:
        return from_documents(Echo(), partial(FileDocuments, str(tmp_path / "*.txt")), order="shuffled", **SETTINGS)

    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("1 2 3 4 " * 50)
    state = of_files().state_dict()
    of_files().load_state_dict(state)
    other = of_files()
    other.lm.model["scale"].data += 1
    with pytest.raises(UserError, match=r"^the language model's weights changed since this run began.*resume=never"):
        other.load_state_dict(state)
    (tmp_path / "2.txt").write_text("1 2 3 4 " * 49 + "1 2 3 5 ")
    with pytest.raises(UserError, match=r"^the text changed since this run began"):
        of_files().load_state_dict(state)
    of_files().load_state_dict({key: value for key, value in state.items() if key != "origin"})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_tokens": 3}, "less than one batch"),
        ({"prefetch": "yes"}, "^prefetch=yes is not known: choose true, false or auto"),
        ({"seq_len": 201}, "longer than the context of echo: give 200 or less"),
        ({"exclude_first": 6}, "leaves nothing of a row"),
        ({"exclude_first": 5, "exclude_bos": True}, "leaves nothing of a row"),
    ],
)
def test_settings_that_leave_nothing_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        data(**changes)


def test_too_little_held_out_text_is_named():
    with pytest.raises(UserError, match="shorter than one row"):
        data(n_documents=2, seq_len=100).held_out_rows(100)
