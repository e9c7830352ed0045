"""Every kind of data that docs/data.md lists as understood, and the sentence for what is not."""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documented import kinds_in_documentation

from sae_lab.runtime.errors import UserError
from sae_lab.text.corpora import FileDocuments
from sae_lab.text.documents import HELD_OUT, TRAIN
from sae_lab.text.streams import HubDocuments

TEXTS = [f"Document {i},\n\n\u4f60\u597d \N{GRINNING FACE}." for i in range(12)]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
CSV = pd.DataFrame(ROWS).to_csv(index=False).encode()
Make = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def files(**contents: bytes) -> Make:
    """Write files; `__` in a name is a dot, and `_of_` a folder's slash."""

    def make(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("__", ".").replace("_in_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return make


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def tar(mode: str, **contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(**contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def parquet(rows: Sequence[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([*rows]), buffer, **options)
    return buffer.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def shards(folder: Path) -> None:
    for i, split in enumerate(["train", "train", "test"]):
        rows = [{"text": split + text} for text in TEXTS[6 * (i % 2) : 6 * (i % 2) + 6]]
        files(**{f"data_in_{split}-0000{i % 2}-of-00002__parquet": parquet(rows)})(folder)
    files(README__md=b"# A data set", LICENSE__txt=b"MIT")(folder)


def hub_folder(folder: Path) -> None:
    configs = b"configs:\n- config_name: a\n  data_dir: one\n- config_name: b\n  data_dir: two\n"
    readme = b"---\nlicense: mit\n" + configs + b"---\n# A data set"
    files(README__md=readme, one_in_train__jsonl=b'{"text": "no"}', two_in_train__jsonl=LINES)(folder)


def saved(folder: Path, *splits: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict(dict.fromkeys(splits, rows)) if splits else rows).save_to_disk(folder / "saved")


def parquet_of_two_schemas(folder: Path) -> None:
    first = [{"text": text, "score": 1, "a": [1]} for text in TEXTS[:6]]
    second = [{"score": "high", "b": {"c": None}, "text": text} for text in TEXTS[6:]]
    files(a__parquet=parquet(first), b__parquet=parquet(second))(folder)


def jsonl_of_two_schemas(folder: Path) -> None:
    first = [json.dumps({"text": text, "meta": {"n": i}}) for i, text in enumerate(TEXTS[:6])]
    second = [json.dumps({"meta": f"s{i}", "more": [i], "text": text}) for i, text in enumerate(TEXTS[6:])]
    files(a__jsonl="\n".join(first).encode(), b__jsonl="\n".join(second).encode())(folder)


ONE_BY_ONE = {f"{i:02}__txt": text.encode() for i, text in enumerate(TEXTS)}
PAIRS = {k: v for i in range(12) for k, v in ((f"{i:02}__json", b'{"n": 1}'), (f"{i:02}__txt", TEXTS[i].encode()))}

# Kind, as in docs/data.md -> (a maker of files, globs in their folder, further options).
KINDS: dict[str, tuple[Make, list[str], dict[str, Any]]] = {
    "txt": (files(**ONE_BY_ONE), ["*.txt"], {}),
    "md": (files(**{name.replace("txt", "md"): text for name, text in ONE_BY_ONE.items()}), ["*.md"], {}),
    "plain text of any name": (
        files(**{name.replace("txt", "rst"): text for name, text in ONE_BY_ONE.items()}),
        ["*.rst"],
        {"format": "text"},
    ),
    "lines": (files(a__txt="\n".join(TEXTS).encode()), ["a.txt"], {"format": "lines"}),
    "jsonl": (files(a__jsonl=LINES), ["*.jsonl"], {}),
    "ndjson": (files(a__ndjson=LINES), ["*.ndjson"], {}),
    "json, an array": (files(a__json=json.dumps(ROWS).encode()), ["*.json"], {}),
    "json, an array of strings": (files(a__json=json.dumps(TEXTS).encode()), ["*.json"], {}),
    "json, an object with a list of rows": (
        files(a__json=json.dumps({"version": "1", "data": ROWS}, indent=1).encode()),
        ["*.json"],
        {},
    ),
    "json, columns": (files(a__json=pd.DataFrame(ROWS).to_json().encode()), ["*.json"], {}),
    "json, an object per line": (files(a__json=LINES), ["*.json"], {}),
    "csv": (files(a__csv=CSV), ["*.csv"], {}),
    "tsv": (files(a__tsv=pd.DataFrame(ROWS).to_csv(index=False, sep="\t").encode()), ["*.tsv"], {}),
    "parquet": (files(a__parquet=parquet(ROWS, compression="zstd")), ["*.parquet"], {}),
    "arrow file": (files(a__arrow=arrow(pa.ipc.new_file)), ["*.arrow"], {}),
    "arrow stream": (files(a__arrow=arrow(pa.ipc.new_stream)), ["*.arrow"], {}),
    "gz": (files(a__jsonl__gz=gzip.compress(LINES)), ["*.gz"], {}),
    "bz2": (files(a__csv__bz2=bz2.compress(CSV)), ["*.bz2"], {}),
    "xz": (files(a__json__xz=lzma.compress(json.dumps(ROWS).encode())), ["*.xz"], {}),
    "zst": (files(a__jsonl__zst=zstd(LINES)), ["*.zst"], {}),
    "tar": (files(a__tar=tar("w", **ONE_BY_ONE)), ["a.tar"], {}),
    "tar.gz": (files(a__tar__gz=tar("w:gz", README__md=b"no", a__jsonl=LINES)), ["*.gz"], {}),
    "zip": (files(a__zip=zipped(**{"b/a__csv": CSV, "license__txt": b"no"})), ["*.zip"], {}),
    "webdataset": (files(a__tar=tar("w", **PAIRS)), ["*.tar"], {"column": "txt"}),
    "folder": (files(x_in_a__jsonl=LINES, x_in_b__png=b"no", README__md=b"no", _in___git=b"no"), ["."], {}),
    "folder of shards": (shards, ["."], {}),
    "parquet files of several schemas": (parquet_of_two_schemas, ["*.parquet"], {}),
    "jsonl files of several schemas": (jsonl_of_two_schemas, ["*.jsonl"], {}),
    "save_to_disk, a Dataset": (saved, ["saved"], {}),
    "save_to_disk, a DatasetDict": (lambda folder: saved(folder, "train", "test"), ["saved"], {}),
    "values inside rows": (
        files(a__jsonl="\n".join(json.dumps({"id": 1, "x": {"y": text}}) for text in TEXTS).encode()),
        ["*.jsonl"],
        {"column": "x.y"},
    ),
}
HUB_KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "hub folder with README.md": (hub_folder, {"name": "b"}),
    "hub folder of shards": (shards, {}),
    "hub folder of compressed files": (files(train__jsonl__gz=gzip.compress(LINES)), {}),
    "hub folder of several schemas": (jsonl_of_two_schemas, {}),
}


def first_text(kind: str) -> str:
    if "shards" in kind:
        return "train" + TEXTS[0]
    return TEXTS[0].split("\n")[0] if kind == "lines" else TEXTS[0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_file_gives_its_exact_text(kind, tmp_path):
    make, globs, options = KINDS[kind]
    make(tmp_path)
    documents = FileDocuments([str(tmp_path / g) for g in globs], **options)
    n = 24 if kind == "lines" else 12
    assert len(documents.rows) == n
    assert documents[0] == first_text(kind)
    if "shards" not in kind and kind != "lines":
        assert documents.batch(range(len(documents))) == [text for i, text in enumerate(TEXTS) if i != 9]


@pytest.mark.parametrize("kind", list(HUB_KINDS))
def test_every_kind_of_stream_gives_its_exact_text(kind, tmp_path):
    make, options = HUB_KINDS[kind]
    make(tmp_path)
    texts = [
        text for window in HubDocuments(str(tmp_path), HELD_OUT, **options).windows(0, None) for text in window.texts
    ]
    assert len(texts) == 12
    assert texts[0] == first_text(kind)


def test_the_documentation_lists_what_is_tested_here():
    assert kinds_in_documentation("test_kinds_of_data.py") == [*KINDS, *HUB_KINDS]


# What is wrong -> (files, globs, options, the sentence).
MISTAKES: dict[str, tuple[Make, list[str], dict[str, Any], str]] = {
    "unknown type": (
        files(a__rst=b"x"),
        ["*.rst"],
        {},
        r"types \['.rst'\]: understood are .txt, .* add format=text, or",
    ),
    "several types": (files(a__csv=CSV, b__txt=b"x"), ["*"], {}, r"\['.csv', '.txt'\]: .* such as '\*.csv'"),
    "mixed folder": (files(d_in_a__csv=CSV, d_in_b__txt=b"x"), ["d"], {}, r"\['.csv', '.txt'\]: all files must be"),
    "nothing in a folder": (files(d_in_a__png=b"x"), ["d"], {}, "has no file that is understood: .txt, .md"),
    "hub folder": (hub_folder, ["."], {}, r"README.md that says which files are data: type data=hub data.path=/"),
    "folder of saved ones": (
        lambda d: saved(d / "x"),
        ["x"],
        {},
        r"save_to_disk: give them, such as paths=\[\S+/saved\]",
    ),
    "only other splits": (
        lambda d: [files(**{f"d_in_{s}-00000-of-00001__parquet": parquet(ROWS)})(d) for s in ("test", "dev")],
        ["d"],
        {},
        r"the splits \['dev', 'test'\] and none called train: .*/dev-\*'\]",
    ),
    "mixed archive": (
        files(a__zip=zipped(a__csv=CSV, b__txt=b"x")),
        ["*.zip"],
        {},
        r"a.zip holds files of types .*unpack",
    ),
    "broken archive": (files(a__zip=b"PK"), ["*.zip"], {}, r"a.zip cannot be read as an archive"),
    "truncated gz": (
        files(a__jsonl__gz=gzip.compress(LINES)[:-30]),
        ["*.gz"],
        {},
        r"a.jsonl.gz cannot be read as jsonl after row \d+ ",
    ),
    "truncated zst": (
        files(a__jsonl__zst=zstd(LINES)[:-30]),
        ["*.zst"],
        {},
        r"a.jsonl.zst cannot be read as jsonl after row",
    ),
    "truncated parquet": (
        files(a__parquet=parquet(ROWS), b__parquet=parquet(ROWS)[:-30]),
        ["*.parquet"],
        {},
        "b.parquet cannot be read as parquet after row 0 .*leave it out of data.paths",
    ),
    "truncated json": (
        files(a__jsonl=LINES[:-5]),
        ["*.jsonl"],
        {},
        r"a.jsonl cannot be read as jsonl after row 11 \(line 12: ",
    ),
    "several lists": (
        files(a__json=b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}'),
        ["*.json"],
        {},
        r"several lists of rows, \['a', 'b'\]",
    ),
    "no object": (
        files(a__jsonl=b'{"text": "x"}\n5'),
        ["*.jsonl"],
        {},
        "after row 1 .*'5', neither an object nor a string",
    ),
    "utf-16": (
        files(a__txt="a b".encode("utf-16")),
        ["*.txt"],
        {},
        "a.txt cannot be read .*UTF-16: convert it to UTF-8",
    ),
    "git lfs": (files(a__csv=b"version https://git-lfs.github.com/spec/v1\n"), ["*.csv"], {}, "run git lfs pull"),
    "a file without the column": (
        files(a__jsonl=LINES, b__jsonl=b'{"body": "x"}'),
        ["*.jsonl"],
        {},
        "b.jsonl has no column text: leave it out",
    ),
    "no text in a row": (
        files(a__jsonl=b'{"text": "x"}\n' * 1000 + b'{"text": ["x"]}'),
        ["*.jsonl"],
        {},
        "row 1,001 of .*a.jsonl has no text at text",
    ),
    "an unknown format": (
        files(a__txt=b"x"),
        ["*"],
        {"format": "xml"},
        "^format='?xml'? is not known: choose auto, text,",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_what_is_not_understood_is_one_sentence(name, tmp_path):
    make, globs, options, message = MISTAKES[name]
    make(tmp_path)
    with pytest.raises(UserError) as e:
        FileDocuments([str(tmp_path / g) for g in globs], **options)
    assert re.search(message, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)


BAD = "\N{REPLACEMENT CHARACTER}"
# What is in a file -> (files, the documents, how many of them are damaged).
CHARACTERS: dict[str, tuple[Make, list[str], int]] = {
    "bytes that are not UTF-8 in jsonl": (
        files(a__jsonl=b'{"text": "caf\xe9"}\n{"text": "b"}\n{"text": "\xe4\xbd"}'),
        [f"caf{BAD}", "b", BAD],
        2,
    ),
    "bytes that are not UTF-8 in csv": (files(a__csv=b"text,n\ncaf\xe9,1\nb,2"), [f"caf{BAD}", "b"], 1),
    "bytes that are not UTF-8 in json": (
        files(a__json=b'[{"text": "caf\xe9"},\n{"text": "b"}]'),
        [f"caf{BAD}", "b"],
        1,
    ),
    "bytes that are not UTF-8 in txt": (files(a__txt=b"caf\xe9", b__txt=b"\xe4\xbdx"), [f"caf{BAD}", f"{BAD}x"], 2),
    "halves of a pair": (files(a__jsonl=b'{"text": "a\\ud83d"}\n{"text": "\\udc80"}'), [f"a{BAD}", BAD], 2),
    "whole pairs": (files(a__jsonl=b'{"text": "\\ud83d\\ude00"}\n{"text": "b"}'), ["\N{GRINNING FACE}", "b"], 0),
    "U+FFFD itself": (files(a__jsonl=json.dumps({"text": BAD}).encode() + b'\n{"text": "b"}'), [BAD, "b"], 0),
    "NUL": (
        files(
            a__jsonl=b'{"text": "a\\u0000b"}\n{"text": "b"}',
        ),
        ["a\0b", "b"],
        0,
    ),
    "NUL in txt": (files(a__txt=b"a\0b", b__txt=b"b"), ["a\0b", "b"], 0),
    "CRLF": (files(a__jsonl=b'{"text": "a\\r\\nb"}\r\n\r\n{"text": "b"}\r\n'), ["a\r\nb", "b"], 0),
    "CRLF in txt": (files(a__txt=b"a\r\nb", b__txt=b"b"), ["a\nb", "b"], 0),
    "BOM in txt": (files(a__txt=b"\xef\xbb\xbfa", b__txt=b"b"), ["a", "b"], 0),
    "BOM in each jsonl": (
        files(a__jsonl=b'\xef\xbb\xbf{"text": "a"}', b__jsonl=b'\xef\xbb\xbf{"text": "b"}'),
        ["a", "b"],
        0,
    ),
    "BOM in csv": (files(a__csv=b"\xef\xbb\xbftext,n\na,1\nb,2"), ["a", "b"], 0),
    "empty rows, null and numbers": (
        files(a__jsonl=b'\n{"text": "a"}\n\n{"text": null}\n{"text": ""}\n{"n": 1}\n{"text": 5}\n'),
        ["a", "", "", "", "5"],
        0,
    ),
    "an empty file": (files(a__jsonl=b"", b__jsonl=b'{"text": "a"}\n{"text": "b"}'), ["a", "b"], 0),
    "an empty file after others": (files(a__jsonl=b'{"text": "a"}\n{"text": "b"}', b__jsonl=b""), ["a", "b"], 0),
}


@pytest.mark.parametrize("name", list(CHARACTERS))
def test_characters_are_read_as_they_are_or_counted(name, tmp_path):
    make, texts, damaged = CHARACTERS[name]
    make(tmp_path)
    splits = [FileDocuments([str(tmp_path / "*")], split) for split in (TRAIN, HELD_OUT)]
    assert [document for d in splits for document in d.batch(range(len(d)))] == texts
    said = f"{damaged:,} of them have bytes that are not UTF-8, which become U+FFFD"
    assert (said in splits[0].describe()) == (damaged > 0)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_arrow_strings_that_are_not_utf8(kind, tmp_path):
    """Arrow does not look into strings when it reads them, and fails when Python asks for one."""
    raw = pa.array([b"caf\xe9", b"b"])
    nested = pa.StructArray.from_arrays([pa.Array.from_buffers(pa.string(), 2, raw.buffers())], ["y"])
    table = pa.table({"x": nested})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    elif kind == "arrow":
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert FileDocuments([str(tmp_path / "*")], column="x.y")[0] == f"caf{BAD}"


def test_a_folder_says_what_is_read_and_what_is_not(tmp_path):
    KINDS["folder"][0](tmp_path)
    line = FileDocuments(str(tmp_path)).describe()
    assert line.endswith(f"; read: 1 .jsonl of {tmp_path.name}, not 1 .png")


def test_documents_of_a_batch_are_those_one_by_one(tmp_path):
    files(a__jsonl=LINES)(tmp_path)
    documents = FileDocuments(str(tmp_path / "*"))
    assert documents.batch([7, 0, 7]) == [documents[7], documents[0], documents[7]]


def test_files_are_converted_once_and_again_when_they_change(tmp_path, monkeypatch):
    files(a__jsonl=LINES)(tmp_path)
    first = FileDocuments(str(tmp_path))
    monkeypatch.setattr("sae_lab.text.prepare.documents_of", None)
    assert FileDocuments(str(tmp_path))[0] == first[0]
    monkeypatch.undo()
    files(a__jsonl=b'{"text": "changed"}\n{"text": "b"}')(tmp_path)
    assert FileDocuments(str(tmp_path))[0] == "changed"
