"""Tokens followed by their ids from the text to the SAE: none lost, none twice, none that was left out."""

import itertools
import json
from functools import partial

import pytest
import torch
from fakes import Follow, UniqueWords

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.cache.data import CachedData
from sae_lab.cache.writer import CacheWriter
from sae_lab.text.corpora import FileDocuments
from sae_lab.text.streams import HubDocuments

BOS, SEQ_LEN = 0, 7
SETTINGS = {"seq_len": SEQ_LEN, "batch_size": 16, "n_tokens": 9999, "block_tokens": 100, "lm_batch_rows": 4, "seed": 3}
SETTINGS |= {"n_eval_tokens": 70, "n_val_tokens": 70, "repeat": False, "pack": True}
WORDS = [UniqueWords()[i] for i in range(60)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    return file


@pytest.fixture(params=["indexed", "files", "hub"])
def documents(request, jsonl, monkeypatch, tmp_path_factory):
    """The same words by every way that text comes in."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    if request.param == "files":
        return partial(FileDocuments, str(jsonl), held_out_every=10)
    if request.param == "hub":
        return partial(HubDocuments, str(jsonl.parent), held_out_documents=8)
    return UniqueWords


@pytest.fixture(params=["streamed", "prefetched", "cached"])
def build(request, tmp_path):
    """(documents, further settings) -> the data of a run."""

    def built(documents, **changes) -> ActivationData:
        settings = SETTINGS | {"prefetch": request.param != "streamed"} | changes
        data = from_documents(Follow(), documents, order="shuffled", **settings)
        if request.param != "cached":
            return data
        data.repeat = False
        CacheWriter(data, str(tmp_path), 10**9, shard_tokens=150).build()
        return CachedData(Follow(), str(tmp_path), **settings)

    return built


def kept(documents, exclude_bos: bool, exclude_first: int) -> list[list[float]]:
    """(id, position, second token of its row) of every token that an epoch should give."""
    text = from_documents(
        Follow(), documents, order="shuffled", **SETTINGS, prefetch=False, exclude_bos=False, exclude_first=0
    )
    rows = text.text.rows("train", repeat=False).take(10**9).tolist()
    return [
        [float(token), float(i), float(row[1])]
        for row in rows
        for i, token in enumerate(row)
        if i >= exclude_first and not (exclude_bos and token == BOS)
    ]


@pytest.mark.parametrize(("exclude_bos", "exclude_first"), [(False, 0), (True, 0), (False, 2), (True, 3)])
def test_an_epoch_gives_every_kept_token_once(build, documents, exclude_bos, exclude_first):
    data = build(documents, exclude_bos=exclude_bos, exclude_first=exclude_first)
    rows = torch.cat(list(data.stream))[:, 0].tolist()
    assert sorted(rows) == sorted(kept(documents, exclude_bos, exclude_first))
    words = [token for token, _, _ in rows if token != BOS]
    assert len(words) == len(set(words))
    assert len(words) > 300
    assert not exclude_bos or BOS not in [token for token, _, _ in rows]
    assert min(position for _, position, _ in rows) >= exclude_first


def test_both_sites_of_a_row_stay_together(build, documents):
    rows = torch.cat(list(build(documents, exclude_bos=True, exclude_first=0).stream))
    assert torch.equal(rows[:, 1], 2 * rows[:, 0])


def test_every_epoch_of_several_gives_every_row_as_often(build):
    epoch = kept(UniqueWords, True, 0)
    data = build(UniqueWords, exclude_bos=True, exclude_first=0, repeat=True)
    rows = torch.cat(list(itertools.islice(data.stream, 3 * len(epoch) // 16)))[:, 0, 0].tolist()
    data.teardown("fit")
    counts = {token: rows.count(token) for token in set(rows)}
    assert len(counts) >= len(epoch)
    assert set(counts.values()) <= {2, 3, 4}


def test_validation_and_evaluation_see_held_out_text_only(build, documents):
    data = build(documents, exclude_bos=True, exclude_first=0)
    trained = set(torch.cat(list(data.stream))[:, 0, 0].tolist())
    judged = set(torch.cat(list(data.val_dataloader()))[:, 0, 0].tolist()) | set(
        data.held_out_rows(70).flatten().tolist()
    )
    assert not trained & (judged - {BOS})
    assert len(judged) > 20
