"""Which column of a data set is read as text, what is asked instead of guessed, and what a user is told."""

import csv
import json
import logging
import re
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from fakes import SETTINGS, Echo

from sae_lab.activations.from_text import from_documents
from sae_lab.runtime.errors import UserError
from sae_lab.text.columns import features_of, plain_text, text_of
from sae_lab.text.corpora import FileDocuments
from sae_lab.text.streams import HubDocuments

N = 100
CHAT = [{"from": "human", "value": "How do I open a file?"}, {"from": "gpt", "value": "Use open()."}]
MESSAGES = [{"role": "user", "content": "How do I open a file?"}, {"role": "assistant", "content": "Use open()."}]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def uid(i: int) -> str:
    return str(uuid.UUID(int=i * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128))


# What a row number i looks like -> what is read of row 0.
TAKEN = {
    "text": (lambda i: {"text": f"a b {i}"}, "a b 0"),
    "text beside ids and urls": (lambda i: {"id": uid(i), "text": f"a b {i}", "url": f"https://x.org/{i}"}, "a b 0"),
    "text beside a chat": (lambda i: {"text": f"a b {i}", "messages": MESSAGES}, "a b 0"),
    "text of numbers": (lambda i: {"text": f"{i}+{i}={2 * i}"}, "0+0=0"),
    "content": (lambda i: {"content": f"a b {i}", "repo": "x", "meta": {"stars": 3}}, "a b 0"),
    "text before content": (lambda i: {"content": "no", "text": f"a b {i}"}, "a b 0"),
    "question and answer": (lambda i: {"question": f"Why {i}?", "answer": "So.", "id": i}, "Why 0?\n\nSo."),
    "the only strings": (lambda i: {"saying": f"a b {i}", "year": 1900 + i, "good": True}, "a b 0"),
    "the only strings, without spaces": (lambda i: {"saying": "\u4f60\u597d" * 3 + str(i)}, "\u4f60\u597d" * 3 + "0"),
}
ASKED = {
    "sharegpt": (
        lambda i: {"id": f"conv_{i:06}", "conversations": CHAT},
        r"id \(string of ids, 'conv_000000'\); conversations.from .*'human'.*type .*column=conversations.value\.$",
    ),
    "token ids and urls": (
        lambda i: {"input_ids": [1, 2, i], "source": f"https://x.org/{i}"},
        r"input_ids \(int64 in a list, '1'\); source \(string of URLs, .*, such as \S*column=input_ids\.$",
    ),
    "nested": (
        lambda i: {"id": uid(i), "data": {"text": f"a b {i}"}},
        r"id \(string of UUIDs, .*data.text \(string, 'a b 0'\).*column=data.text\.$",
    ),
    "messages": (lambda i: {"prompt_id": uid(i), "messages": MESSAGES}, r"such as \S*column=messages.content\.$"),
    "a text beside a list": (lambda i: {"title": f"a b {i}", "parts": ["c d e f", "g h i j"]}, r"column=parts\.$"),
    "only ids": (lambda i: {"id": uid(i), "n": i}, "id .string of UUIDs, .*if one of them is"),
    "only urls": (lambda i: {"where": f"s3://bucket/{i}"}, "where .string of URLs"),
    "only hashes": (lambda i: {"sha": f"{i * 7919:040x}"}, "sha .string of hashes"),
    "only numbers": (lambda i: {"n": f"1,{i:03}.5 "}, "n .string of numbers"),
    "only file names": (lambda i: {"file": f"images/{'ab'[i % 2]}.jpg"}, "file .string of ids"),
    "only labels": (lambda i: {"label": ["good", "bad"][i % 2], "n": i}, "label .string of single words"),
    "json in a string": (lambda i: {"dialog": json.dumps(CHAT)}, "dialog .string of JSON"),
    "urls called content": (lambda i: {"content": f"https://x.org/{i}"}, "content .string of URLs"),
    "two columns of strings": (lambda i: {"title": "a b", "summary": f"a b c {i}"}, r"such as \S*column=summary\.$"),
    "a name with a space": (lambda i: {"my text": "a b c", "x": "a b"}, r"""such as '\S*column="my text"'\.$"""),
    "braces": (lambda i: {"a": "is {column} {{x}}", "b": "c d"}, r"a \(string, 'is \{column\} \{\{x\}\}'\)"),
    "no strings": (lambda i: {"x": i}, "x .int64, '0'"),
}
# Column as typed -> what is read of a row.
NAMED = [
    ({"data": {"text": "a b"}, "id": "x"}, "data.text", "a b"),
    ({"conversations": CHAT}, "conversations.value", "How do I open a file?\nUse open()."),
    ({"messages": MESSAGES}, "messages[].content", "How do I open a file?\nUse open()."),
    ({"messages": MESSAGES}, "messages.content", "How do I open a file?\nUse open()."),
    ({"turns": [["a", ""], ["b c"]]}, "turns", "a\nb c"),
    ({"a": {"b": [{"c": "x"}, {"c": "y"}]}, "d": "z"}, ["d", "a.b[].c"], "z\n\nx\ny"),
    ({"id": "conv_1", "n": 1}, "id", "conv_1"),
    ({"data.text": "a b"}, "data.text", "a b"),
    ({"data": None, "x": "y"}, "x", "y"),
]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    """The rows as one file, or a folder of `save_to_disk`; returns its path."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(next(path.glob("*.arrow")) if kind == "arrow" else path)


def refusal(make: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        make(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", list(TAKEN))
def test_a_plain_text_is_taken(name, tmp_path):
    row, text = TAKEN[name]
    assert FileDocuments(write(tmp_path, "jsonl", [row(i) for i in range(N)]), chat=False)[0] == text


@pytest.mark.parametrize("name", list(ASKED))
def test_a_doubtful_text_is_asked_for(name, tmp_path):
    row, message = ASKED[name]
    path = write(tmp_path, "jsonl", [row(i) for i in range(N)])
    sentence = refusal(FileDocuments, path, chat=False)
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "saved"])
@pytest.mark.parametrize("name", ["sharegpt", "token ids and urls", "nested"])
def test_the_rule_is_the_same_for_every_kind_of_file(kind, name, tmp_path):
    row, _ = ASKED[name]
    rows = [row(i) for i in range(N)]
    expected = refusal(FileDocuments, write(tmp_path, "jsonl", rows), chat=False)
    assert refusal(FileDocuments, write(tmp_path, kind, rows), chat=False).replace("int32", "int64") == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["sharegpt", "token ids and urls", "nested", "only urls"])
def test_the_rule_is_the_same_for_streams(kind, name, tmp_path):
    row, _ = ASKED[name]
    path = write(tmp_path, kind, [row(i) for i in range(N)])
    assert refusal(HubDocuments, str(tmp_path), chat=False) == refusal(FileDocuments, path, chat=False)


def test_the_rule_is_the_same_for_csv(tmp_path):
    assert "of URLs" in refusal(
        FileDocuments, write(tmp_path, "csv", [{"x": f"http://a/{i}", "n": i} for i in range(9)])
    )
    assert FileDocuments(write(tmp_path, "csv", [{"saying": f"a b {i}", "n": i} for i in range(9)]))[0] == "a b 0"


@pytest.mark.parametrize(("row", "column", "text"), NAMED)
@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_columns_are_named_by_paths(row, column, text, kind, tmp_path):
    assert FileDocuments(write(tmp_path, kind, [row] * 3), column=column)[0] == text


def test_streams_take_paths_too(tmp_path):
    write(tmp_path, "parquet", [{"id": str(i), "messages": MESSAGES} for i in range(4)])
    documents = HubDocuments(str(tmp_path), column="messages[].content", held_out_documents=1)
    assert [p.text for p in documents.pieces(0)] == ["How do I open a file?\nUse open()."] * 3


def test_a_path_that_is_no_text(tmp_path):
    path = write(tmp_path, "jsonl", [{"id": "x", "n": 1, "messages": MESSAGES}])
    for column in ("n", "messages.contents", ["id", "n"], ["id", "messages"]):
        assert "must be among ['id', 'messages.role', 'messages.content', 'messages']" in refusal(
            FileDocuments, path, column=column
        )


def test_missing_values_are_no_text(tmp_path):
    rows = [{"a": None, "b": [{"c": "x"}, None, {"c": None}]}, {"a": {"t": "y"}, "b": None}]
    documents = FileDocuments(write(tmp_path, "jsonl", [*rows, *rows]), column=["a.t", "b.c"])
    assert [text_of(row, documents.columns) for row in rows] == ["x", "y"]


def test_text_files_are_never_asked_about(tmp_path):
    (tmp_path / "a.txt").write_text("https://x.org/1")
    (tmp_path / "b.txt").write_text("https://x.org/2")
    assert FileDocuments(str(tmp_path / "*.txt"))[0] == "https://x.org/1"


# ---- folders written by save_to_disk


@pytest.fixture
def saved(tmp_path) -> Path:
    """`one` is a Dataset; `two` has the splits train and test; `three` has two others; `four` has one other."""
    set_of = {n: datasets.Dataset.from_list([{"text": f"{n} {i}", "i": i} for i in range(12)]) for n in "abc"}
    set_of["a"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=set_of["b"], train=set_of["a"]).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(first=set_of["b"], second=set_of["c"]).save_to_disk(tmp_path / "three")
    datasets.DatasetDict(first=set_of["c"]).save_to_disk(tmp_path / "four")
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "first"), [("one", "a"), ("two", "a"), ("two/test", "b"), ("three/second", "c"), ("four", "c")]
)
def test_a_saved_folder_is_read(saved, folder, first):
    documents = FileDocuments([str(saved / folder)])
    assert [documents[i] for i in range(len(documents))] == [f"{first} {i}" for i in range(12) if i != 9]
    assert documents.digest() == FileDocuments(f"{saved / folder}/").digest() != ""


def test_several_saved_folders_are_one_data_set(saved):
    assert len(FileDocuments([str(saved / "one"), str(saved / "four")]).rows) == 24
    datasets.Dataset.from_list([{"other": "x"}]).save_to_disk(saved / "five")
    assert "differ" in refusal(FileDocuments, [str(saved / "one"), str(saved / "five")])


def test_mistakes_in_saved_folders(saved):
    assert f"paths=[{saved / 'three' / 'first'}]" in refusal(FileDocuments, [str(saved / "three")])
    for folder in ("one", "two"):
        assert f"data=text_files data.paths=[{saved / folder}]" in refusal(HubDocuments, str(saved / folder))
    (saved / "a.txt").write_text("a b")
    assert "one type" in refusal(FileDocuments, [str(saved / "one"), str(saved / "a.txt")])
    next((saved / "one").glob("*.arrow")).write_text("broken")
    assert "cannot be read as written by save_to_disk" in refusal(FileDocuments, [str(saved / "one")])


# ---- what is said


def test_what_is_read_is_said(tmp_path):
    rows = [{"id": i, "text": f"line {i}\n\x1b[31m" + "long " * 40} for i in range(1200)]
    line = FileDocuments(write(tmp_path, "parquet", rows)).describe()
    shown = ("line 0 \N{REPLACEMENT CHARACTER}[31m" + "long " * 40)[:80] + "\N{HORIZONTAL ELLIPSIS}"
    assert line == f"text: column text of 1,200 documents; the first begins {shown!r}"
    assert HubDocuments(str(tmp_path)).describe() == (
        line.replace("1,200", "an unknown number of") + "; held out: the first 1,000"
    )


def test_what_is_read_is_said_once(tmp_path, caplog):
    path = write(tmp_path, "jsonl", [{"text": f"{i} {i + 1} {i + 2}"} for i in range(12)])
    with caplog.at_level(logging.INFO, logger="sae_lab.text.text"):
        stream = from_documents(Echo(), partial(FileDocuments, path), order="shuffled", **SETTINGS)
        stream.text.held_out(2)
        stream.text.first_rows(2)
    line = "text: column text of 12 documents; the first begins '0 1 2'"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_usual_name_does_not_make_text_of_ids_beside_a_chat():
    chat = [{"from": "human", "value": "How do I open a file?"}]
    rows = [{"text": f"conv_{i:06}", "conversations": chat} for i in range(20)]
    assert plain_text(features_of(rows), rows) == ()
    rows = [{"text": f"Some text number {i}.", "conversations": chat} for i in range(20)]
    assert [column.path for column in plain_text(features_of(rows), rows)] == ["text"]


def test_one_text_among_hashes_does_not_make_a_column_text():
    rows = [{"sha": f"{i:040x}"} for i in range(19)] + [{"sha": "first commit of all"}]
    assert plain_text(features_of(rows), rows) == ()
