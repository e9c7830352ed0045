"""Mixtures of texts: exact shares, the order of each part, resuming at every row, ends, and who is named."""

import json
from functools import partial

import pytest
import torch
from fakes import UniqueWords, WordIds
from pages import Broken, Pages

from sae_lab.runtime.errors import UserError
from sae_lab.text import window_rows
from sae_lab.text.encoding import Encoder
from sae_lab.text.mixture import MixedText, Part
from sae_lab.text.shares import next_parts, whole_shares
from sae_lab.text.text import Text

WEIGHTS = [(0.7, 0.3), (1, 1), (1, 1000), (0.5, 0.2, 0.2, 0.1), (3, 1, 1), (1, 2, 3, 4, 5, 6, 7), (1,) * 10, (1e-3, 1)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(window_rows, "SMALLEST", 10)


def text_of(documents) -> Text:
    return Text(documents, Encoder(WordIds()), 0, seq_len=4, pack=True, order="shuffled", window_tokens=40)


def mixed(seed: int = 0, n_documents: int = 60, weights=(0.7, 0.3), pages=Pages) -> MixedText:
    """A text with random access, of 7 tenths, and one without."""
    texts = (partial(UniqueWords, n_documents=n_documents, seed=seed), partial(pages, seed=seed))
    names, shares = ("parts.words", "parts.pages"), whole_shares(weights)
    return MixedText([Part(*part, text_of(text)) for *part, text in zip(names, shares, texts, strict=True)])


# ---- shares


def test_weights_become_the_smallest_integers_of_their_proportions():
    assert [whole_shares(w) for w in ((0.7, 0.3), (2, 4, 6), (0.1, 1e-3))] == [(7, 3), (1, 2, 3), (100, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_its_shares_to_less_than_one_row(weights):
    shares = whole_shares(weights)
    s, total, counts = 2 * len(shares) - 2, sum(shares), [0] * len(shares)
    for m, part in enumerate(next_parts(shares, counts, 3000), 1):
        counts[part] += 1
        off = max(abs(m * share - count * total) for share, count in zip(shares, counts, strict=True))
        assert off * s <= (s - 1) * total, (m, counts)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_order_of_parts_continues_from_any_row(weights):
    shares = whole_shares(weights)
    whole = next_parts(shares, [0] * len(shares), 300)
    for n in range(0, 300, 7):
        assert next_parts(shares, [whole[:n].count(i) for i in range(len(shares))], 300 - n) == whole[n:]


def test_seven_tenths_and_three_tenths():
    assert next_parts((7, 3), (0, 0), 10) == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


# ---- rows


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rows_of_a_part_are_those_of_the_part_alone_in_its_order(split):
    text = mixed()
    rows, order = text.rows(split, True).take(100), torch.tensor(next_parts((7, 3), (0, 0), 100))
    for i, part in enumerate(text.parts):
        assert torch.equal(rows[order == i], part.text.rows(split, True).take((70, 30)[i]))


def test_a_state_continues_at_every_row_over_passes_of_both_parts():
    def begin():
        return mixed(n_documents=9, pages=partial(Pages, n_windows=4), weights=(3, 2)).rows("train", True)

    stream = begin()
    whole = stream.take(107)
    assert [part["epoch"] for part in stream.state_dict()["parts"]] == [1, 2]
    stream = begin()
    for i in range(100):
        resumed = begin()
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert torch.equal(resumed.take(7), whole[i : i + 7])
        assert torch.equal(stream.take(1), whole[i : i + 1])


def test_chunks_of_any_size_and_a_closed_stream_give_the_same_rows():
    whole, stream = mixed().rows("train", True).take(60), mixed().rows("train", True)
    parts = [stream.take(n) for n in (1, 0, 2, 30)]
    stream.close()
    assert torch.equal(torch.cat([*parts, stream.take(27)]), whole)


def test_the_seed_changes_training_rows_and_no_held_out_row():
    assert not torch.equal(mixed(seed=0).first_rows(20), mixed(seed=1).first_rows(20))
    assert torch.equal(mixed(seed=0).held_out(20), mixed(seed=1).held_out(20))


def test_a_new_pass_names_the_part(caplog):
    mixed(n_documents=6).rows("train", True).take(100)
    passes = [f"End of data.parts.words: starting pass {n} over it, in a new order." for n in (2, 3)]
    assert caplog.messages[:2] == passes


def test_without_repeat_the_mixture_ends_with_the_first_part(caplog):
    alone = len(mixed(n_documents=6).parts[0].text.rows("train", False).take(10**6))
    stream = mixed(n_documents=6).rows("train", False)
    rows = stream.take(10**4)
    order = next_parts((7, 3), (0, 0), len(rows) + 1)
    assert (order[:-1].count(0), order[-1]) == (alone, 0)
    assert torch.equal(rows, mixed(n_documents=6).rows("train", True).take(len(rows)))
    assert caplog.messages[0].startswith("End of the training text of data.parts.words: the mixture ends at row ")
    assert len(stream.take(5)) == 0


# ---- what is said and known


def test_the_identity_is_of_the_texts_and_the_weights():
    first = mixed().identity()
    assert first == mixed(weights=(7, 3)).identity()
    assert len({first, mixed(weights=(1, 1)).identity(), mixed(n_documents=59).identity()}) == 3
    assert mixed(pages=partial(Pages, n_windows=3)).identity() != first  # has no digest, so by its first rows


def test_what_is_tokenized_and_what_fails_names_the_part(capsys):
    text = mixed(pages=Broken)
    text.prepare()
    assert capsys.readouterr().out.startswith("data.parts.words: tokenized 60 documents")
    with pytest.raises(UserError, match=r"^data\.parts\.pages: page 6 cannot be read\."):
        text.rows("train", True).take(200)
    with pytest.raises(UserError, match=r"^data\.parts\.words: the data hold no text"):
        mixed(n_documents=1).first_rows(1)
