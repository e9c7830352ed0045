"""Pairs of a token and the token before it, as training batches."""

import pytest
import torch
from fakes import Follow, UniqueWords, data

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.previous import has_previous
from sae_lab.activations.stream import StreamData
from sae_lab.runtime.errors import UserError


def test_pairs_are_neighbours_of_one_document():
    tokens = torch.tensor([[0, 5, 6, 0, 7, 8, 9]])
    kept = torch.tensor([[False, True, True, False, True, False, True]])
    everything = torch.ones_like(kept)
    assert has_previous(tokens, kept, 0).tolist() == [[False, False, True, False, False, False, False]]
    assert has_previous(tokens, everything, 0).tolist() == [[False, True, True, False, True, True, True]]


def settings(**changes):
    return {
        "seq_len": 12,
        "batch_size": 8,
        "n_tokens": 300,
        "block_tokens": 64,
        "lm_batch_rows": 3,
        "exclude_bos": True,
        "exclude_first": 0,
        "pack": True,
        "prefetch": False,
        "repeat": True,
        "n_eval_tokens": 24,
        "n_val_tokens": 24,
        "seed": 0,
    } | changes


def follow(**changes) -> ActivationData:
    return from_documents(Follow(), lambda split: UniqueWords(split), order="shuffled", **settings(**changes))


@pytest.mark.parametrize("prefetch", [False, True])
def test_every_row_comes_with_the_token_before_it(prefetch):
    """Words count up within a document, so a neighbour is one less, at both sites."""
    pairs = follow(prefetch=prefetch).with_previous()
    x = torch.cat(list(pairs.train_dataloader()))
    assert x.shape == (300, 4, 3)
    now, before = x[:, 0, 0], x[:, 2, 0]
    assert torch.equal(before, now - 1)
    assert torch.equal(x[:, 2:, 1], x[:, :2, 1] - torch.tensor([1.0, 2.0]))
    assert torch.equal(x[:, 3], 2 * x[:, 2])
    assert (now >= 1).all()
    assert now.unique().numel() > 100


def test_pairs_resume_exactly_and_leave_what_is_held_out_alone():
    plain = follow()
    pairs = plain.with_previous()
    batches = list(pairs.train_dataloader())
    pairs = plain.with_previous()
    stream = iter(pairs.train_dataloader())
    first = [next(stream) for _ in range(11)]
    state = pairs.state_dict()
    again = follow().with_previous()
    again.load_state_dict(state)
    rest = list(again.train_dataloader())
    assert all(torch.equal(a, b) for a, b in zip(batches, first + rest, strict=True))
    assert torch.equal(pairs.validation_rows(), plain.validation_rows())
    assert pairs.block_bytes == 2 * plain.block_bytes
    assert next(iter(plain.train_dataloader())).shape == (8, 2, 3)


def test_a_row_is_left_out_where_either_of_a_pair_is_too_long():
    limited = follow(max_norm=1.5)
    x = torch.cat(list(limited.with_previous().train_dataloader()))
    limits = torch.tensor(list(limited.positions.limits.values())).repeat(2)
    assert (x.norm(dim=-1) <= limits).all()


def test_data_without_an_order_of_text_say_so():
    with pytest.raises(UserError, match="echo does not tell which row comes before another"):
        StreamData.with_previous(data())


def test_pairs_are_not_for_batches_of_whole_rows():
    with pytest.raises(UserError, match="loss=kl_mse has batches of whole text rows, not of pairs"):
        follow(batch_size=12).in_whole_rows().with_previous()
