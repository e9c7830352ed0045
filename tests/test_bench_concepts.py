"""The labels that bench/concepts/data.py gives to text, on a module that fits on a screen."""

import importlib.util
import random
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "bench" / "concepts" / "data.py"
SOURCE = '''"""What the module is for."""
import os
# a remark that is longer than six characters
def function_name(argument):
    return os.getcwd() + 'a string of words'
'''


@pytest.fixture(scope="module")
def data():
    spec = importlib.util.spec_from_file_location("concepts_data", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stretches_of_text_have_one_kind(data):
    found = [(kind, SOURCE[start:end]) for kind, start, end in data.spans(data.tokens(SOURCE))]
    assert found == [
        ("string", '"""What the module is for."""'),
        ("code", "import os"),
        ("comment", "# a remark that is longer than six characters"),
        ("def", "def function_name(argument):"),
        ("code", "return os.getcwd() +"),
        ("string", "'a string of words'"),
    ]


def test_a_prefix_ends_after_a_word_of_its_kind(data):
    places = data.tokens(SOURCE)
    spans = list(data.spans(places))
    for seed in range(5):
        for kind, text in data.prefixes(SOURCE, places, random.Random(seed)):
            assert SOURCE.startswith(text)
            assert text[-1].isalnum()
            assert not SOURCE[len(text)].isalnum()
            assert [name for name, start, end in spans if start < len(text) < end] == [kind]


def test_keywords_are_told_from_names(data, monkeypatch):
    monkeypatch.setattr(data, "CONTEXT", 6)
    said = [(label, text.split()[-1]) for label, text in data.words(SOURCE, data.tokens(SOURCE))]
    assert said[:4] == [("keyword", "import"), ("name", "os"), ("keyword", "def"), ("name", "n_name")]


def test_the_tables_have_the_columns_that_sae_probes_reads(data, tmp_path):
    pd = pytest.importorskip("pandas")
    ends = {kind: [f"{kind} {i}" for i in range(data.N_PROBE)] for kind in (*data.KINDS, "keyword", "name")}
    data.write_probes(tmp_path, ends, random.Random(0))
    table = pd.read_csv(tmp_path / "probing_datasets_MASTER.csv.zst")
    assert set(table["Data type"]) == {"Binary Classification"}
    for tag, saved in zip(table["Dataset Tag"], table["Dataset save name"], strict=True):
        rows = pd.read_csv(tmp_path / f"{saved}.zst")
        assert saved.rsplit("/", 1)[1].split("_", 1)[1] == f"{tag}.csv"
        assert list(rows.columns) == ["prompt", "target"]
        assert rows["target"].value_counts().to_dict() == {0: data.N_PROBE // 2, 1: data.N_PROBE // 2}
        assert all((row.prompt.split()[0] == tag.removeprefix("py_")) == row.target for row in rows.itertuples())
