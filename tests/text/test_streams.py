"""Streams of the hub: which documents are held out, shards that fail, and a data set that is too small."""

import json
import logging
from pathlib import Path

import pytest
from datasets.packaged_modules.json.json import Json

from sae_lab.runtime.errors import UserError
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents
from sae_lab.text.streams import PAUSES, HubDocuments


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    """40 documents in four shards, read in windows of a few documents."""
    monkeypatch.setattr("sae_lab.text.documents.WINDOW", 40)
    for shard in range(4):
        rows = [json.dumps({"text": f"document {10 * shard + i:02}", "n": i}) for i in range(10)]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(rows))
    return str(tmp_path)


@pytest.fixture
def failures(monkeypatch) -> dict[str, int]:
    """How often each shard is still to fail, after its first rows; the pauses after failures are counted, not made."""
    left: dict[str, int] = {}
    read = Json._generate_tables

    def generate(self, **kwargs):
        name = Path(kwargs["base_files"][0]).name
        for key, table in read(self, **kwargs):
            if left.get(name, 0) > 0:
                left[name] -= 1
                yield key, table.slice(0, 3)
                raise ConnectionError("the connection was lost")
            yield key, table

    monkeypatch.setattr(Json, "_generate_tables", generate)
    monkeypatch.setattr("sae_lab.text.streams.sleep", lambda pause: left.update(pauses=left.get("pauses", 0) + 1))
    return left


def texts_of(documents: Documents, place=None, first: int = 0) -> list[str]:
    return [piece.text for piece in documents.pieces(0, place, first)]


def numbers(documents: Documents) -> list[int]:
    return sorted(int(text.split()[1]) for text in texts_of(documents))


def test_one_in_n_is_held_out(folder):
    options = {"held_out_documents": 3, "held_out_every": 5}
    assert numbers(HubDocuments(folder, HELD_OUT, **options)) == [4, 9, 14]
    assert numbers(HubDocuments(folder, TRAIN, **options)) == [n for n in range(40) if n not in (4, 9, 14)]
    assert HubDocuments(folder, **options).describe().endswith("held out: one in 5 of the first 15")
    assert HubDocuments(folder, held_out_documents=3).describe().endswith("held out: the first 3")


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_a_stream_with_one_in_n_held_out_continues_at_every_document(folder, split):
    def new() -> HubDocuments:
        return HubDocuments(folder, split, held_out_documents=6, held_out_every=4)

    whole = list(new().pieces(0))
    assert len(whole) == (34 if split == TRAIN else 6)
    for n, piece in enumerate(whole):
        place = json.loads(json.dumps(piece.place))
        assert texts_of(new(), place, piece.n) == [later.text for later in whole[n:]]


def test_a_shard_that_fails_is_tried_again_and_nothing_is_lost_or_read_twice(folder, failures, caplog):
    expected = texts_of(HubDocuments(folder, held_out_documents=5))
    documents = HubDocuments(folder, held_out_documents=5)
    documents.commit = "c0ffee"  # as if it were on the hub
    failures |= {"train-1.jsonl": 2, "train-3.jsonl": len(PAUSES)}
    with caplog.at_level(logging.WARNING):
        assert texts_of(documents) == expected
    assert failures["pauses"] == 2 + len(PAUSES)
    assert caplog.messages[0] == (
        "the shard train-1.jsonl cannot be read (the connection was lost): trying again in 1 seconds."
    )


def test_a_shard_that_keeps_failing_is_named_and_the_stream_continues_where_it_was(folder, failures):
    expected = list(HubDocuments(folder, held_out_documents=5).pieces(0))
    documents = HubDocuments(folder, held_out_documents=5)
    documents.commit = "c0ffee"
    failures |= {"train-2.jsonl": 99}
    read = []
    with pytest.raises(UserError) as e:
        read.extend(documents.pieces(0))  # extend keeps what came before the failure
    assert str(e.value) == (
        f"the shard train-2.jsonl of data.path={folder} cannot be read (the connection was lost): "
        "once it can, the same command continues from the last checkpoint."
    )
    assert read == expected[: len(read)]
    assert len(read) >= 10
    failures.clear()
    rest = texts_of(HubDocuments(folder, held_out_documents=5), read[-1].place, read[-1].n)
    assert rest == [piece.text for piece in expected[len(read) - 1 :]]


def test_a_broken_local_shard_is_not_tried_again(folder, failures):
    documents = HubDocuments(folder, held_out_documents=5)
    failures |= {"train-0.jsonl": 1}
    with pytest.raises(UserError, match=r"the shard train-0\.jsonl of "):
        texts_of(documents)
    assert "pauses" not in failures


def test_a_data_set_that_is_held_out_as_a_whole(folder):
    documents = HubDocuments(folder, held_out_documents=1000)
    with pytest.raises(UserError) as e:
        texts_of(documents)
    assert str(e.value) == (
        f"data.path={folder} has 40 documents, and data.held_out_documents=1000 leaves none of them to train on: "
        "type data.held_out_documents=4."
    )


def test_a_shard_with_other_columns_after_the_sample(tmp_path):
    for name, row in (("a", {"text": "first", "n": 1}), ("b", {"more": [1], "text": "second", "n": "x"})):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 30))
    texts = texts_of(HubDocuments(str(tmp_path), held_out_documents=1))
    assert sorted(set(texts)) == ["first", "second"]
    assert len(texts) == 59
