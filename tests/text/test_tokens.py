"""Token ids that are there before: taken as they are, checked against the vocabulary, packed."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from documented import kinds_in_documentation
from fakes import SETTINGS, Echo

from sae_lab.activations.from_text import hub, text_files, tokens
from sae_lab.activations.mixture import mixture
from sae_lab.runtime.errors import UserError
from sae_lab.text import window_rows
from sae_lab.text.corpora import FileDocuments
from sae_lab.text.documents import HELD_OUT, TRAIN
from sae_lab.text.encoding import Encoder
from sae_lab.text.streams import HubDocuments
from sae_lab.text.text import Text
from sae_lab.text.token_files import TokenFiles

BOS, EOS, N_IDS = 0, 1, 300
DOCUMENTS = [[10 * i + j + 2 for j in range(1 + i % 5)] for i in range(24)]
FLAT = [i for ids in DOCUMENTS for i in (*ids, EOS)]
OPTIONS = {"n_ids": N_IDS, "bos_id": BOS, "eos_id": EOS}


class NoTokenizer:
    """What is left of a tokenizer where none is called."""

    eos_token_id, name_or_path = EOS, "none"

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(N_IDS)}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path_factory.mktemp("tokens")))


def rows_of(**more: Any) -> list[dict[str, Any]]:
    return [{"id": f"a{i}", "input_ids": ids, **more} for i, ids in enumerate(DOCUMENTS)]


def write(folder: Path, kind: str, rows: list[dict[str, Any]] | None = None) -> str:
    rows = rows_of() if rows is None else rows
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(folder / "saved")
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(next((folder / "saved").glob("*.arrow")))
    return str(path)


def ids_of(documents: Any) -> list[list[int]]:
    return [document.ids.tolist() for document in documents.batch(range(len(documents)))]


def text_of(documents: Any, seq_len: int = 6, **options: Any) -> Text:
    options = {"pack": True, "order": "shuffled"} | options
    return Text(documents, Encoder(NoTokenizer()), BOS, seq_len=seq_len, **options)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "saved"])
def test_a_column_of_ids_is_taken_as_it_is(kind, tmp_path):
    documents = FileDocuments(write(tmp_path, kind), column="input_ids")
    assert ids_of(documents) == [ids for i, ids in enumerate(DOCUMENTS) if i % 10 != 9]
    assert documents.describe().startswith(
        "token ids, taken as they are: column input_ids of 24 documents; the first b"
    )
    assert documents.kinds == {"tokens"}


def test_a_stream_of_ids(tmp_path):
    write(tmp_path, "parquet")
    documents = HubDocuments(str(tmp_path), column="input_ids", held_out_documents=4)
    assert [one.ids.tolist() for window in documents.windows(0, None) for one in window.texts] == DOCUMENTS[4:]


def test_padding_is_dropped_and_other_columns_are_not_read(tmp_path):
    more = {"attention_mask": [1, 1, 0], "labels": [-100, 5, -100], "input_ids": [5, 6, 7]}
    documents = FileDocuments(write(tmp_path, "parquet", [more] * 12), column="input_ids")
    assert ids_of(documents) == [[5, 6]] * 11
    assert documents.describe().endswith("; ignored: labels")
    rows = [{"x": {"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1]}}] * 12
    assert ids_of(FileDocuments(write(tmp_path, "jsonl", rows), column="x.input_ids")) == [[6, 7]] * 11


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("mask", [[True, True, False], [1, 1, 0]])
def test_a_mask_holds_booleans_or_numbers(mask, kind, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": mask}] * 12
    assert ids_of(FileDocuments(write(tmp_path, kind, rows), column="input_ids")) == [[5, 6]] * 11


@pytest.mark.parametrize("mask", [[1, 2, 0], [0.5, 1.0, 1.0], ["a", "b", "c"], [1, None, 1]])
def test_a_mask_of_other_values_is_named(mask, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": mask}] * 3
    with pytest.raises(UserError, match=r"row 1 of .* in its mask attention_mask in the place of 0 and 1"):
        FileDocuments(write(tmp_path, "jsonl", rows), column="input_ids")


# Kind -> what writes the file, the ids of all documents.
ARRAYS: dict[str, tuple[str, np.ndarray, dict[str, Any]]] = {
    "uint16.bin": ("bin", np.array(FLAT, "<u2"), {}),
    "uint32.bin": ("bin", np.array(FLAT, "<u4"), {}),
    "int64.bin": ("bin", np.array(FLAT, "<i8"), {}),
    "int32.bin": ("bin", np.array(FLAT, "<i4"), {"dtype": "int32"}),
    "uint16, named": ("bin", np.array(FLAT, "<u2"), {"dtype": "uint16"}),
    "int64.npy": ("npy", np.array(FLAT), {}),
    "uint16.npy": ("npy", np.array(FLAT, "<u2"), {}),
}


def write_array(path: Path, array: np.ndarray) -> str:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        array.tofile(path)
    return str(path)


@pytest.mark.parametrize("name", list(ARRAYS))
def test_arrays_are_cut_at_the_ends_of_documents(name, tmp_path):
    suffix, array, options = ARRAYS[name]
    path = write_array(tmp_path / f"a.{suffix}", array)
    train, held_out = (TokenFiles(path, split, **OPTIONS, **options) for split in (TRAIN, HELD_OUT))
    ended = [[*ids, EOS] for ids in DOCUMENTS]
    assert ids_of(train) == [ids for i, ids in enumerate(ended) if i % 10 != 9]
    assert ids_of(held_out) == [ended[9], ended[19]]
    assert f"{len(FLAT)} ids ({array.dtype.name}) of 24 documents; the first begins '2 1'" in train.describe()


def test_the_documentation_lists_what_is_tested_here():
    assert kinds_in_documentation("test_tokens.py") == ["jsonl", "parquet", "arrow", "saved", *ARRAYS]


@pytest.mark.parametrize(("magic", "version", "kind"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_a_header_of_llm_c_is_skipped(magic, version, kind, tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(FLAT)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.array(FLAT, kind).tobytes())
    assert ids_of(TokenFiles(str(tmp_path / "*.bin"), **OPTIONS))[:2] == [[2, EOS], [12, 13, EOS]]


def test_documents_that_begin_with_bos(tmp_path):
    flat = [i for ids in DOCUMENTS for i in (BOS, *ids)]
    path = write_array(tmp_path / "a.bin", np.array(flat, "<u2"))
    documents = partial(TokenFiles, path, **OPTIONS)
    assert ids_of(documents())[1] == [BOS, *DOCUMENTS[1]]
    plain = write(tmp_path, "jsonl")
    same = text_of(documents), text_of(partial(FileDocuments, plain, column="input_ids"))
    assert same[0].identity() == same[1].identity()


def test_rows_of_seq_len_stay_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.zeros((20, 1), int), rng.integers(2, N_IDS, (20, 5))], 1)
    rows[3, 2] = BOS  # as packed rows have it
    path = write_array(tmp_path / "a.npy", rows)
    store = text_of(partial(TokenFiles, path, **OPTIONS))._open("train")
    assert store.read(np.arange(18)).tolist() == np.delete(rows, [9, 19], 0).tolist()
    short = text_of(partial(TokenFiles, write_array(tmp_path / "b.npy", rows[4:, 1:]), **OPTIONS))._open("train")
    assert short.read(np.arange(9)).tolist() == rows[4:13].tolist()


def test_an_array_without_ends_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lab.text.token_files.PIECE", 50)
    path = write_array(tmp_path / "a.bin", np.arange(2, 202).astype("<u2"))
    assert [len(ids) for ids in ids_of(TokenFiles(path, **OPTIONS))] == [20] * 9
    assert ids_of(TokenFiles(path, HELD_OUT, **OPTIONS)) == [list(range(182, 202))]
    longer = write_array(tmp_path / "b.bin", np.arange(2, 202).repeat(5).astype("<u2"))
    assert {len(ids) for ids in ids_of(TokenFiles(longer, **OPTIONS))} == {50}


LARGE = np.random.default_rng(0).integers(2, 128_000, 1001)


@pytest.mark.parametrize("n_ids", [50_257, 128_256])
def test_the_type_is_inferred_with_a_large_vocabulary(n_ids, tmp_path):
    for kind in ("<u2", "<u4", "<i8"):
        for n in (1000, 1001):
            ids = LARGE[:n] % (50_000 if kind == "<u2" else n_ids)
            path = write_array(tmp_path / "a.bin", ids.astype(kind))
            assert np.concatenate(TokenFiles(path, **(OPTIONS | {"n_ids": n_ids}))._flat).tolist() == ids.tolist()


@pytest.mark.parametrize(("bad", "said"), [(70_000, "70,000"), (200_000, "200,000"), (-100, "-100")])
@pytest.mark.parametrize("n_ids", [50_257, 65_537, 128_256])
def test_uint32_with_a_bad_id_is_not_read_as_uint16(n_ids, bad, said, tmp_path):
    ids = LARGE[:1000] % n_ids
    ids[7] = bad
    path = write_array(tmp_path / "a.bin", ids.astype("<i4"))
    documents = partial(TokenFiles, path, **(OPTIONS | {"n_ids": n_ids}))
    if 0 <= bad < n_ids:
        assert documents()[0].ids[7] == bad
        return
    with pytest.raises(UserError, match=rf"holds the token id {said} as its id number 7, .* has {n_ids:,}: give data"):
        documents()


def test_a_file_that_may_be_uint32_needs_a_dtype(tmp_path):
    ids = LARGE[:1000] % 65_536
    ids[::3] = BOS  # more small ids than text has
    path = write_array(tmp_path / "a.bin", ids.astype("<u2"))
    large = OPTIONS | {"n_ids": 128_256}
    with pytest.raises(UserError, match="or type dtype=uint16 if that is the type of the ids"):
        TokenFiles(path, **large)
    assert TokenFiles(path, dtype="uint16", **large)._flat[0].tolist() == ids.tolist()


def test_a_store_of_another_inferred_type_is_not_used(tmp_path, monkeypatch):
    path = write_array(tmp_path / "a.bin", np.array(FLAT * 3))
    right = text_of(partial(TokenFiles, path, **OPTIONS)).first_rows(5)
    monkeypatch.setattr("sae_lab.text.token_files.inferred_type", lambda *_: "uint32")
    assert not torch.equal(text_of(partial(TokenFiles, path, **OPTIONS)).first_rows(5), right)


def test_a_negative_id_of_int64_is_named(tmp_path):
    path = write_array(tmp_path / "a.bin", np.array([5, 6, EOS, 7, -100, EOS] * 5))
    with pytest.raises(UserError, match="from its id number 3 on, holds the token id -100"):
        text_of(partial(TokenFiles, path, **OPTIONS)).first_rows(1)


MISTAKES: dict[str, tuple[str, np.ndarray, dict[str, Any], str]] = {
    "ids of another type": ("a.bin", np.array([5, 70000], "<u4"), {}, "neither uint16 nor uint32 gives ids below 300"),
    "no vocabulary": ("a.bin", np.array([5], "<u2"), {"n_ids": 0}, "is not known: type dtype=uint16 or uint32"),
    "half an id": ("a.bin", np.array([5], "<u2"), {"dtype": "uint32"}, "2 bytes, no whole ids of dtype=uint32"),
    "floats": ("a.npy", np.array([0.5]), {}, r"holds float64 of shape \(1,\) in the place of token ids"),
    "three axes": ("a.npy", np.zeros((2, 2, 2), int), {}, r"shape \(2, 2, 2\)"),
    "objects": ("a.npy", np.array([{}], object), {}, "cannot be read as .npy"),
    "an unknown type": ("a.bin", np.array([5], "<u2"), {"dtype": "float16"}, "dtype=.?float16.? is not known: choose"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_what_is_no_array_of_ids_is_one_sentence(name, tmp_path):
    file, array, options, message = MISTAKES[name]
    write_array(tmp_path / file, array)
    with pytest.raises(UserError, match=message):
        TokenFiles(str(tmp_path / "a.*"), **(OPTIONS | options))
    with pytest.raises(UserError, match=r"no file matches paths=.*: give .bin or .npy files"):
        TokenFiles(str(tmp_path / "b.*"), **OPTIONS)


@pytest.mark.parametrize("bad", [300, -1])
@pytest.mark.parametrize("kind", ["jsonl", "saved", "npy"])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(bad, kind, tmp_path):
    rows = [{"input_ids": [5, 6]}] * 4 + [{"input_ids": [5, bad]}] + [{"input_ids": [5]}] * 7
    if kind == "npy":
        path = write_array(tmp_path / "a.npy", np.array([5, 6, EOS, 7, bad, EOS] * 3))
        documents: Any = partial(TokenFiles, path, **OPTIONS)
        place = f"document 2 of {path}, from its id number 3 on,"
    else:
        path = write(tmp_path, kind, rows)
        documents = partial(FileDocuments, path, column="input_ids")
        place = f"row 5 of {path if kind == 'jsonl' else 'data.paths'}"
    with pytest.raises(UserError, match=f"{place} holds the token id {bad}, and the model's vocabulary has 300: give"):
        text_of(documents).first_rows(1)


def test_a_value_that_is_no_id_is_named_with_its_place(tmp_path):
    for value in ([1.5], ["a"], [[1]], [[1], [2, 3]], [True]):
        path = write(tmp_path, "jsonl", [{"input_ids": [5]}] * 1000 + [{"input_ids": value}])
        with pytest.raises(UserError, match=rf"row 1,001 of {path} holds .* in the place of token ids"):
            FileDocuments(path, column="input_ids")
    rows = [{"input_ids": [5, 6], "attention_mask": [1]}] * 3
    with pytest.raises(UserError, match=r"row 1 of .* has 2 ids and a mask of 1"):
        FileDocuments(write(tmp_path, "jsonl", rows), column="input_ids")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("ids", [[[5, 6], [7]], [[5, 6, 7]]])
def test_a_list_of_lists_is_one_sentence(ids, kind, tmp_path):
    path = write(tmp_path, kind, [{"input_ids": ids}] * 3)
    with pytest.raises(
        UserError, match=r"input_ids holds a list of lists of int\d\d in each row: one list of token ids"
    ):
        FileDocuments(path, column="input_ids")


def lm(**changes: Any) -> Any:
    model = Echo()
    for name, value in {"tokenizer": NoTokenizer(), "bos_id": BOS, **changes}.items():
        setattr(model, name, value)
    return model


ROWS = {"column": "input_ids", "dtype": None, "held_out_every": 10}


def test_no_tokenizer_is_used_and_none_is_named(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    path = write_array(tmp_path / "a.bin", np.array(FLAT * 3, "<u2"))
    data = tokens(lm(), [path], **ROWS, order="shuffled", **SETTINGS)
    assert next(iter(data.train_dataloader())).shape == (4, 2, 2)
    assert set(data.source_digests) == {"the language model's weights", "the text"}
    said = data.text.reading()
    assert said == {"kinds": ["tokens"], "tokenizer_used": False, "digest": data.source_digests["the text"]}
    assert "token ids, taken as they are: 282 ids (uint16) of 72 documents" in caplog.text
    assert "packed 65 documents: 372 tokens" in capsys.readouterr().out


def tokens_of(path: Path) -> Any:
    return tokens(lm(), [str(path)], **ROWS, order="as_read", **SETTINGS)


@pytest.mark.parametrize("suffix", ["bin", "npy"])
@pytest.mark.parametrize("where", [".", "**", "*"])
def test_the_shards_of_a_folder_are_read_in_order(where, suffix, tmp_path):
    for i, name in enumerate(["b", "a", "c"]):
        write_array(tmp_path / f"{name}.{suffix}", np.array([10 + i, EOS] * 20, "<u2"))
    (tmp_path / "README.md").write_text("shards")
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "index.idx").write_bytes(b"1")
    same = [TokenFiles(str(tmp_path / glob), **OPTIONS) for glob in (where, f"*.{suffix}")]
    assert [ids for ids, _ in ids_of(same[0])] == [11] * 18 + [10] * 18 + [12] * 18
    assert same[0].digest() == same[1].digest()
    assert torch.equal(tokens_of(tmp_path / where).text.first_rows(20), tokens_of(tmp_path).text.first_rows(20))


def test_a_folder_without_ids_of_one_type_is_one_sentence(tmp_path):
    (tmp_path / "a.xyz").write_text("a")
    with pytest.raises(UserError, match=r"no file that is understood: .*, and, with data=tokens, \.bin and \.npy\."):
        tokens_of(tmp_path)
    for suffix in ("bin", "npy"):
        write_array(tmp_path / f"a.{suffix}", np.array(FLAT, "<u2"))
    with pytest.raises(UserError, match=r"has .bin and .npy files: give those of one type, such as .*/\*\*/\*.bin'\]"):
        tokens_of(tmp_path).text.first_rows(1)


def test_every_source_of_ids_gives_the_same_rows(tmp_path):
    text = {"chat": "auto", "special_tokens": "text", "column": "input_ids"}
    settings = SETTINGS | {"order": "as_read", "seed": 3}
    path = write(tmp_path, "jsonl")
    made = [
        tokens(lm(), [path], **ROWS, **settings),
        text_files(lm(), [path], format="auto", held_out_every=10, **text, **settings),
    ]
    first, other = (data.text.first_rows(100) for data in made)
    assert torch.equal(first, other)
    of_hub = {"name": None, "hub_split": "train", "held_out_documents": 2, "held_out_every": None, "revision": None}
    stream = hub(lm(), str(tmp_path), **of_hub, **text, window_tokens=None, **settings)
    there = {i for ids in DOCUMENTS[2:] for i in ids}
    found = [i for i in stream.text.first_rows(100).flatten().tolist() if i != BOS]
    assert len(found) == len(set(found)) > len(there) - SETTINGS["seq_len"]
    assert set(found) <= there


@pytest.mark.parametrize("order", ["shuffled", "as_read"])
@pytest.mark.parametrize("source", ["store", "stream"])
def test_a_state_continues_at_every_row(order, source, tmp_path, monkeypatch):
    monkeypatch.setattr(window_rows, "SMALLEST", 10)
    monkeypatch.setattr("sae_lab.text.documents.WINDOW", 20)
    documents: Any = partial(TokenFiles, write_array(tmp_path / "a.bin", np.array(FLAT, "<u2")), seed=1, **OPTIONS)
    if source == "stream":
        write(tmp_path, "parquet")
        documents = partial(HubDocuments, str(tmp_path), column="input_ids", held_out_documents=2, seed=1)

    def new():
        return text_of(documents, order=order, window_tokens=40).rows("train", repeat=True)

    whole = new().take(40)
    assert (whole[:, 0] == BOS).all()
    assert not (whole[:, 1] == BOS).any()
    for n in range(0, 40, 7):
        stream, rest = new(), new()
        stream.take(n)
        rest.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert torch.equal(rest.take(40 - n), whole[n:])


def test_ids_are_not_taken_where_text_is_asked_for(tmp_path):
    rows = rows_of(source="https://x.org")
    with pytest.raises(UserError, match=r"plainly the text: .*such as column=input_ids\.$"):
        FileDocuments(write(tmp_path, "jsonl", rows))


def test_text_is_no_token_ids(tmp_path):
    path = write(tmp_path, "jsonl", [{"text": "a b", "input_ids": [5]}] * 12)
    with pytest.raises(UserError, match="column=text holds no token ids: type data=text_files"):
        tokens(lm(), [path], **(ROWS | {"column": "text"}), order="shuffled", **SETTINGS)


def test_a_mixture_of_text_and_token_ids(tmp_path):
    path = write_array(tmp_path / "a.bin", np.array(FLAT * 3, "<u2"))
    parts = {"sources": [partial(tokens, paths=[path], **ROWS)] * 2, "order": "shuffled", **SETTINGS}
    data = mixture(lm(), **parts)
    assert set(data.source_digests) == {"the language model's weights", "the text"}
    assert [one["tokenizer_used"] for one in data.text.reading().values()] == [False, False]
    (tmp_path / "text.txt").write_text("5 6 7 " * 200)
    texts = partial(text_files, paths=[str(tmp_path / "*.txt")], format="auto", held_out_every=10, column=None)
    parts["sources"] = [parts["sources"][0], partial(texts, chat="auto", special_tokens="text")]
    data = mixture(lm(tokenizer=Echo.tokenizer), **(parts | {"sources": parts["sources"][1:] * 2}))
    assert data.text.reading() == {}
    assert "the tokenizer" in data.source_digests
