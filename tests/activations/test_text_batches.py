"""Batches of whole text rows: every row once and in order, what is left out, and continuing at any batch."""

import pytest
import torch
from fakes import data

from sae_lab.runtime.errors import SettingError

SIZES = {"batch_size": 12, "n_tokens": 62}  # batches of 2 rows of 6 tokens, 10 rows in all


def batches(**changes) -> list:
    return list(data(**(SIZES | changes)).in_whole_rows().train_dataloader())


def test_the_batches_are_the_rows_of_the_text_with_the_activations_at_what_is_kept():
    given = batches(exclude_first=1)
    assert torch.equal(torch.cat([batch.tokens for batch in given]), data(**SIZES).rows().take(10))
    assert [len(batch) for batch in given] == [2 * 5] * 5
    for batch in given:
        assert not batch.keep[:, 0].any()
        assert torch.equal(batch.x[:, 0, 0], batch.tokens[:, 1:].flatten().float())  # an activation is its token


def test_the_last_batch_may_be_smaller_and_the_text_may_end():
    assert [len(batch.tokens) for batch in batches(n_tokens=56)] == [2, 2, 2, 2, 1]
    assert sum(len(batch.tokens) for batch in batches(n_tokens=6000, repeat=False)) < 1000


def test_a_stream_continues_where_its_state_was_saved():
    whole = batches()
    first, second = (data(**SIZES).in_whole_rows() for _ in range(2))
    given = iter(first.train_dataloader())
    next(given), next(given)
    second.load_state_dict(first.state_dict())
    rest = list(second.train_dataloader())
    assert len(rest) == 3
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.x, b.x)


def test_a_batch_holds_whole_rows():
    with pytest.raises(SettingError, match=r"batch_size.*=14 is not a multiple of .*seq_len.*=6"):
        data(batch_size=14).in_whole_rows()
