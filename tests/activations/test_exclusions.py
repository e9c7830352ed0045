"""Tokens and long rows that are left out: which, where, and how the share is said."""

from functools import partial

import pytest
import torch
from fakes import SETTINGS, Echo, Numbers, WordIds

from sae_lab.activations.data import ActivationData
from sae_lab.activations.exclusions import Exclusions, is_short, norm_limits, token_ids
from sae_lab.activations.from_text import from_documents
from sae_lab.cache.data import CachedData
from sae_lab.cache.reader import Cache
from sae_lab.cache.writer import CacheWriter
from sae_lab.runtime.errors import SettingError, UserError


class Spikes(Echo):
    """An activation is (token id, 0) / 200, 500 times as long at site b for every fifth token; BOS has 0."""

    def activations(self, tokens):
        x = super().activations(tokens) * torch.tensor([1.0, 0.0]) / 200
        long = torch.tensor([0.0, 1.0])[None, None, :, None] * (tokens % 5 == 0)[:, :, None, None]
        return x * (1 + 499 * long)


def spiky(**changes) -> ActivationData:
    settings = SETTINGS | {"repeat": False, "order": "shuffled"} | changes
    return from_documents(Spikes(), partial(Numbers, n_documents=40), **settings)


def ids(data: ActivationData) -> list[int]:
    """The token of every row of a stream."""
    return (torch.cat(list(data.stream))[:, 0, 0] * 200).round().int().tolist()


def test_each_cause_leaves_out_its_positions():
    tokens = torch.tensor([[0, 3, 4, 0], [5, 4, 3, 3]])
    masks = Exclusions(bos_id=0, bos=True, first=1, tokens=(3, 5)).masks(tokens)
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {
        "exclude_first": [[1, 0, 0, 0], [1, 0, 0, 0]],
        "exclude_bos": [[1, 0, 0, 1], [0, 0, 0, 0]],
        "exclude_tokens": [[0, 1, 0, 0], [1, 0, 1, 1]],
    }
    assert Exclusions(0, True, 1, (3, 5)).keep(tokens).int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_tokens_are_ids_or_strings_that_are_one_token():
    assert token_ids(WordIds(), ["12", 7, "7"]) == (7, 12)
    with pytest.raises(SettingError, match=r"has '1 2', which is 2 tokens .* \(\[1, 2\]\): give strings that are one"):
        token_ids(WordIds(), ["1 2"])
    with pytest.raises(SettingError, match="has -1, which is no id of this tokenizer"):
        token_ids(WordIds(), [-1])


def test_a_row_is_too_long_if_it_is_at_any_site():
    rows = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[6.0, 8.0], [2.0, 0.0]], [[0.0, 9.0], [5.0, 0.0]]])
    limits = norm_limits(torch.cat([rows, rows[:1]]), ["a", "b"], 2.0)  # norms 5, 10, 9, 5 and 1, 2, 5, 1
    assert limits == {"a": 10.0, "b": 2.0}
    assert is_short(rows, [10.0, 2.0]).tolist() == [True, True, False]
    assert is_short(rows, [9.5, 2.0]).tolist() == [True, False, False]


def test_excluded_tokens_and_long_rows_reach_no_sae_and_the_others_do():
    every = ids(spiky())
    assert any(i and i % 5 == 0 for i in every)
    assert sorted(ids(spiky(max_norm=10))) == sorted(i for i in every if i % 5 or i == 0)
    banned = every[:3]
    assert sorted(ids(spiky(exclude_tokens=[str(banned[0]), *banned[1:]]))) == sorted(
        i for i in every if i not in banned
    )


@pytest.mark.parametrize("changes", [{"lm_batch_rows": 1}, {"block_tokens": 40}, {"prefetch": True}, {"seed": 3}])
def test_the_limit_is_the_same_whatever_the_sizes(changes):
    here = spiky(max_norm=10, **changes)
    assert here.positions.limits == spiky(max_norm=10).positions.limits
    assert sorted(ids(here)) == sorted(ids(spiky(max_norm=10)))
    here.teardown("fit")


def test_a_resumed_run_keeps_its_limit_and_reads_on_exactly():
    batches = list(spiky(max_norm=10).stream)
    for given in range(len(batches)):
        before = spiky(max_norm=10)
        for _ in range(given):
            next(before.stream)
        state = before.state_dict()
        after = spiky(max_norm=10)
        after.positions.limits.update(dict.fromkeys(after.positions.limits, 0.0))
        after.load_state_dict(state)
        assert torch.equal(next(after.stream), batches[given])
    assert "norm_limits" not in spiky().state_dict()


def test_evaluation_and_training_leave_out_the_same():
    data = spiky(max_norm=10, exclude_bos=True)
    tokens = data.held_out_rows(18)
    keep, rows = data.positions.read(tokens)
    assert torch.equal(keep, (tokens % 5 != 0) & (tokens != 0))
    assert torch.equal(rows, data.lm.activations(tokens)[keep])
    assert torch.equal(data.positions.mask_with(tokens, data.lm.activations(tokens)), keep)


def test_the_share_of_each_cause_is_logged(caplog):
    caplog.set_level("INFO")
    data = spiky(max_norm=10, exclude_bos=True, exclude_tokens=[1100])
    tokens = data.positions.probe_text()
    shares = [(tokens == 0), (tokens == 1100), (tokens % 5 == 0) & (tokens != 0) & (tokens != 1100)]
    bos, one, long = (share.float().mean().item() for share in shares)
    long /= 1 - bos - one
    told = f"data.exclude_bos {bos:.2%}, data.exclude_tokens {one:.2%}, data.max_norm {long:.2%}."
    assert f"Left out of {tokens.numel():,} held-out tokens: {told}" in caplog.text


def test_a_cache_holds_what_is_left_and_its_limit(tmp_path):
    settings = {"max_norm": 10, "exclude_tokens": [101], "repeat": False}
    manifest = CacheWriter(spiky(**settings), str(tmp_path), 1000, 40).build()
    harvested = torch.cat([Cache(str(tmp_path)).piece(i) for i in range(Cache(str(tmp_path)).n_pieces)])
    assert sorted((harvested[:, 0, 0] * 200).round().int().tolist()) == sorted(ids(spiky(**settings)))
    cached = CachedData(Spikes(), str(tmp_path), **(SETTINGS | settings))
    assert cached.positions.limits == manifest.norm_limits
    assert manifest.norm_limits == spiky(max_norm=10, exclude_tokens=[101]).positions.limits
    assert not any(i and i % 5 == 0 for i in ids(cached))
    tokens = cached.held_out_rows(18)
    assert torch.equal(cached.positions.read(tokens)[0], (tokens % 5 != 0) | (tokens == 0))
    with pytest.raises(UserError, match=r"data.max_norm is 10 in the cache and None here"):
        CachedData(Spikes(), str(tmp_path), **(SETTINGS | settings | {"max_norm": None}))
    with pytest.raises(UserError, match=r"data.exclude_tokens is \[101\] in the cache and \[\] here"):
        CachedData(Spikes(), str(tmp_path), **(SETTINGS | settings | {"exclude_tokens": []}))
