"""Documents and the rows packed from them: what is in a row, where a stream continues, what a user is told."""

import csv
import itertools
import json
import logging
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sae_lab.cli.help import CONF
from sae_lab.runtime.errors import UserError
from sae_lab.text.bundled import LEFT_OUT, DisassembledStdlib, StdlibDocuments, disassemble, is_held_out
from sae_lab.text.corpora import FileDocuments
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents, IndexedDocuments, Piece
from sae_lab.text.encoding import Encoder
from sae_lab.text.rows import TextRows
from sae_lab.text.streams import HubDocuments

BOS = 0
STDLIB = sysconfig.get_paths()["stdlib"]


class Words:
    """A tokenizer whose ids are whitespace-separated words, numbered from 1 as they appear."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool, **_) -> dict[str, list[int]]:
        assert split_special_tokens
        assert not add_special_tokens
        return {"input_ids": [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, rows: list[list[int]]) -> list[str]:
        words = {BOS: "BOS"} | {i: word for word, i in self.ids.items()}
        return [" ".join(words[i] for i in row) for row in rows]


class ListDocuments(IndexedDocuments):
    """Documents of a list; in its order at every pass, unless shuffled."""

    def __init__(self, texts: list[str], shuffled: bool = False):
        super().__init__(seed=0)
        self.texts, self.shuffled = texts, shuffled

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> str:
        return self.texts[i]

    def pieces(self, epoch: int, place=None, first: int = 0, cut_one=None):
        if self.shuffled:
            return super().pieces(epoch, place, first, cut_one)
        return iter([Piece({"window": 0}, n, text) for n, text in enumerate(self.texts)][first:])


def rows_of(texts: list[str], seq_len: int, **options) -> TextRows:
    return TextRows(ListDocuments(texts), Encoder(Words()), seq_len, BOS, **options)


def some_texts(n: int) -> list[str]:
    """Documents of 0 to 8 words, no word twice."""
    return [" ".join(f"w{i}.{j}" for j in range(i * 5 % 9)) for i in range(n)]


def decoded(rows: TextRows) -> list[str]:
    return rows.encode.tokenizer.decode(list(rows))


def read(documents: IndexedDocuments) -> list[str]:
    return [documents[i] for i in range(len(documents))]


def texts_of(documents: Documents, epoch: int = 0) -> list[str]:
    """A pass, in its order."""
    return [piece.text for piece in documents.pieces(epoch)]


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of a few documents, and pieces of a few characters."""
    monkeypatch.setattr("sae_lab.text.documents.WINDOW", 40)
    monkeypatch.setattr("sae_lab.text.documents.PIECE", 11)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ---- rows


def test_the_example_of_the_docstring():
    rows = rows_of(["a b c d e", "f g h"], 4, repeat=False)
    assert decoded(rows) == ["BOS a b c", "BOS d e BOS", "BOS f g h"]


def test_a_document_that_ends_with_its_row():
    rows = rows_of(["a b c", "d e f g"], 4, repeat=False)
    assert decoded(rows) == ["BOS a b c", "BOS d e f"]


def test_documents_without_tokens_are_passed_over():
    assert decoded(rows_of(["", "a", " ", "", "b c", "", "d", ""], 6, repeat=False)) == ["BOS a BOS b c BOS"]


@pytest.mark.parametrize("seq_len", [2, 3, 7, 50])
def test_nothing_is_lost_and_bos_comes_first_and_never_twice(seq_len):
    texts = some_texts(40)
    rows = rows_of(texts, seq_len, repeat=False)
    packed = list(rows)
    assert all(len(row) == seq_len and row[0] == BOS for row in packed)
    assert all(BOS not in (row[i], row[i + 1]) or row[i] != row[i + 1] for row in packed for i in range(seq_len - 1))
    words = " ".join(texts).split()
    kept = [word for row in rows.encode.tokenizer.decode(packed) for word in row.split() if word != "BOS"]
    assert kept == words[: len(kept)]
    assert len(words) - len(kept) < seq_len  # the last, unfilled row


def test_a_stream_that_ends_stays_ended():
    rows = rows_of(["a b c d"], 3, repeat=False)
    assert len(list(rows)) == 2
    assert next(rows, None) is None


def test_a_new_pass_has_a_new_order_and_is_announced(caplog):
    texts = [f"w{i}" for i in range(30)]
    rows = TextRows(ListDocuments(texts, shuffled=True), Encoder(Words()), 2, BOS)
    with caplog.at_level(logging.WARNING, logger="sae_lab.text.rows"):
        first = rows.encode.tokenizer.decode(list(itertools.islice(rows, 30)))
        assert not caplog.records
        second = rows.encode.tokenizer.decode(list(itertools.islice(rows, 30)))
    assert sorted(first) == sorted(second)
    assert first != second
    assert [r.getMessage() for r in caplog.records] == ["End of the text: starting pass 2 over it, in a new order."]


@pytest.mark.parametrize(
    ("texts", "seq_len"), [(some_texts(12), 3), (some_texts(12), 2), (["a b c"], 4), (["a", ""], 2)]
)
@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_a_state_continues_at_every_row(texts, seq_len, repeat, pack, small_windows):
    """The stream crosses three passes; a new stream given any of its states continues with the same rows."""
    tokenizer, n = Words(), 3 * (sum(len(t.split()) + 1 for t in texts) // (seq_len - 1)) + 4

    def stream() -> TextRows:
        return TextRows(ListDocuments(texts, shuffled=True), Encoder(tokenizer), seq_len, BOS, repeat, pack)

    rows = stream()
    states, packed = [rows.state_dict()], []
    for row in itertools.islice(rows, n):
        packed.append(row)
        states.append(rows.state_dict())
    assert len(packed) == n or not repeat
    for i, state in enumerate(states):
        resumed = stream()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        assert list(itertools.islice(resumed, len(packed) - i)) == packed[i:]
        assert resumed.state_dict() == states[-1]


@pytest.mark.parametrize("seq_len", [2, 3, 7])
def test_unpacked_rows_hold_one_document_each_and_all_that_fills_a_row(seq_len):
    texts = some_texts(40)
    rows = rows_of(texts, seq_len, repeat=False, pack=False)
    cut = [words[i : i + seq_len - 1] for words in map(str.split, texts) for i in range(0, len(words), seq_len - 1)]
    assert decoded(rows) == ["BOS " + " ".join(words) for words in cut if len(words) == seq_len - 1]


def test_unpacked_rows_need_a_document_that_fills_one():
    rows = rows_of(["a b c", "d e"], 5, pack=False)
    with pytest.raises(UserError, match=r"no document fills a row of seq_len=5: lower seq_len, or set data.pack=true"):
        next(rows)
    assert decoded(rows_of(["a b c", "d e"], 4, pack=False, repeat=False)) == ["BOS a b c"]


@pytest.mark.parametrize("adds", ["nothing", "bos", "bos and eos"])
@pytest.mark.parametrize("bos", ["<|first|>", "<|other|>"])
def test_a_tokenizer_adds_nothing_and_text_cannot_forge_a_special_token(adds, bos):
    """A real tokenizer, whose BOS has id 0 or another, with templates of its own."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|first|>", "<|other|>"]
    bpe.train_from_iterator([], trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet))
    bos_id = bpe.token_to_id(bos)
    if adds != "nothing":
        template = f"{bos} $A {bos}" if adds == "bos and eos" else f"{bos} $A"
        bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(bos, bos_id)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos)
    rows = list(TextRows(ListDocuments(["ab", f"c{bos}d"]), Encoder(tokenizer), 8, bos_id, repeat=False))
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in bos]
    assert rows[0] == [bos_id, a, b, bos_id, c, *spelled[:3]]
    assert rows[1] == [bos_id, *spelled[3:], d][:8]
    assert (bos_id == 0) == (bos == "<|first|>")


@pytest.mark.parametrize("pack", [True, False])
def test_long_documents_are_mixed_with_the_others_piece_by_piece(pack, small_windows):
    long = " ".join(f"l{i:02}" for i in range(60))  # 20 pieces of 3 words each
    documents = ListDocuments(["a b c", long, "d e f"], shuffled=True)
    assert sorted("".join(sorted(texts_of(documents)))) == sorted("a b cd e f" + long)
    assert texts_of(documents) != texts_of(ListDocuments(["a b c", long, "d e f"]))
    rows = TextRows(documents, Encoder(Words()), 3, BOS, repeat=False, pack=pack)
    assert sum("l" in row for row in decoded(rows)) >= 20


def test_a_stream_is_entered_by_reading_no_more_than_a_window(small_windows):
    class Counting(ListDocuments):
        read = 0

        def __getitem__(self, i: int) -> str:
            self.read += 1
            return super().__getitem__(i)

    texts = [f"document {i:02}" for i in range(40)]  # 11 characters: four in a window
    pieces = list(ListDocuments(texts, shuffled=True).pieces(0))
    assert sorted(piece.text for piece in pieces) == texts
    documents = Counting(texts, shuffled=True)
    assert next(documents.pieces(0, pieces[-1].place, pieces[-1].n)) == pieces[-1]
    assert documents.read <= 4


def test_a_stream_can_be_wound_back():
    rows = rows_of(some_texts(12), 4)
    list(itertools.islice(rows, 3))
    state = rows.state_dict()
    ahead = list(itertools.islice(rows, 5))
    rows.load_state_dict(state)
    assert list(itertools.islice(rows, 5)) == ahead


@pytest.mark.parametrize("texts", [[], ["", " "]])
@pytest.mark.parametrize("repeat", [True, False])
def test_no_text_at_all(texts, repeat):
    with pytest.raises(UserError, match="no text"):
        next(rows_of(texts, 4, repeat=repeat))


def test_rows_need_room():
    with pytest.raises(UserError, match="seq_len=1"):
        rows_of(["a"], 1)


# ---- the standard library


def test_stdlib_splits():
    train, kept = StdlibDocuments(TRAIN), StdlibDocuments(HELD_OUT)
    assert not set(train.paths) & set(kept.paths)
    share = len(kept) / (len(train) + len(kept))
    assert 0.07 < share < 0.13
    assert not LEFT_OUT & {part for path in train.paths for part in path.relative_to(STDLIB).parts}
    assert "def " in train[0] + train[1] + train[2]


def test_held_out_is_by_checksum():
    """Written out, so that no later change moves modules from one split to the other unseen."""
    names = ["abc.py", "ast.py", "io.py", "json/decoder.py", "os.py", "re/__init__.py", "ssl.py", "typing.py"]
    assert [name for name in names if is_held_out(name, 10)] == ["ssl.py"]


def test_the_order_depends_on_seed_and_pass():
    orders = [
        tuple(texts_of(StdlibDocuments(TRAIN, seed=seed), epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    assert orders[0] == orders[3]
    assert len(set(orders)) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


# ---- files


def write(folder: Path, kind: str, texts: list[str], column: str = "text") -> str:
    """The texts as files of one kind; returns the glob that finds them."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("txt", "md"):
        for i, text in enumerate(texts):
            (folder / f"{i:03}.{kind}").write_text(text)
    elif kind == "jsonl":
        lines = [json.dumps({"id": i, column: text}) for i, text in enumerate(texts)]
        (folder / "rows.jsonl").write_text("\n".join(lines))
    elif kind == "csv":
        with (folder / "rows.csv").open("w", newline="") as f:
            csv.writer(f).writerows([["id", column], *enumerate(texts)])
    elif kind == "parquet":
        pd.DataFrame({"id": range(len(texts)), column: texts}).to_parquet(folder / "rows.parquet")
    return str(folder / f"*.{kind}")


TEXTS = [f"document {i}\nof two lines\n\nand a paragraph" for i in range(23)]


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "csv", "parquet"])
def test_files_of_every_kind(kind, tmp_path):
    paths = write(tmp_path, kind, TEXTS)
    assert read(FileDocuments(paths, TRAIN)) == [t for i, t in enumerate(TEXTS) if i % 10 != 9]
    assert read(FileDocuments([paths], HELD_OUT)) == [TEXTS[9], TEXTS[19]]


def test_few_documents_keep_the_last_one_out(tmp_path):
    paths = write(tmp_path, "jsonl", TEXTS[:3])
    assert read(FileDocuments(paths, TRAIN)) == TEXTS[:2]
    assert read(FileDocuments(paths, HELD_OUT)) == TEXTS[2:3]


def test_of_a_single_document_the_last_tenth_is_kept_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    paths = write(tmp_path, "txt", [text])
    train, kept = read(FileDocuments(paths, TRAIN)), read(FileDocuments(paths, HELD_OUT))
    assert (len(train), len(kept)) == (1, 1)
    assert train[0] + kept[0] == text
    assert len(kept[0]) == pytest.approx(len(text) / 10, abs=1)


@pytest.mark.parametrize("column", ["content", "completion", "anything"])
def test_the_text_column_is_found(column, tmp_path):
    assert FileDocuments(write(tmp_path, "jsonl", TEXTS, column))[0] == TEXTS[0]


def test_columns_may_be_named_and_must_be_when_nothing_tells_them_apart(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "r": "b"}\n{"q": "c", "r": null}\n{"q": "", "r": ""}')
    paths = str(tmp_path / "rows.jsonl")
    with pytest.raises(
        UserError, match=r"no column .* the text: q \(string, 'a'\); r \(string, 'b'\): type column=NAME"
    ):
        FileDocuments(paths)
    assert read(FileDocuments(paths, column="r")) == ["b", ""]
    assert read(FileDocuments(paths, column=["q", "r"])) == ["a\n\nb", "c"]


def test_an_only_column_is_the_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"x": "a"}\n{"x": null}\n{"x": "c"}')
    assert read(FileDocuments(str(tmp_path / "rows.jsonl"))) == ["a", ""]


def test_names_and_bytes_that_are_not_plain(tmp_path):
    """Brackets are a pattern to `datasets`, and Latin-1 is no UTF-8."""
    folder = tmp_path / "set [1]"
    folder.mkdir()
    (folder / "a*b.txt").write_bytes(b"caf\xe9")
    (folder / "b.TXT").write_text("second")
    paths = [str(tmp_path / "*" / "*.txt"), str(tmp_path / "*" / "*.TXT")]
    assert read(FileDocuments(paths, TRAIN)) + read(FileDocuments(paths, HELD_OUT)) == ["caf\ufffd", "second"]


def test_changed_files_are_read_again(tmp_path):
    paths = write(tmp_path, "txt", TEXTS[:2])
    assert FileDocuments(paths)[0] == TEXTS[0]
    time.sleep(0.01)
    (tmp_path / "000.txt").write_text("changed")
    assert FileDocuments(paths)[0] == "changed"


MISTAKES = [
    ({"paths": "*.nothing"}, "no file matches"),
    ({"paths": ""}, r"types \['.jsonl', '.parquet', '.txt'\]"),
    ({"paths": "*"}, r"types \['.docx', '.jsonl', '.parquet', '.txt'\]"),
    ({"paths": "*.docx"}, r"types \['.docx'\]"),
    ({"paths": "*.jsonl", "column": "txet"}, r"column=txet .*\['text'\]"),
    ({"paths": "*.parquet"}, "broken.parquet cannot be read as parquet after row 0 .*magic bytes"),
    ({"paths": "*.jsonl", "held_out_every": 1}, "^held_out_every=1 must be a whole number of at least 2"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_in_files(options, message, tmp_path):
    write(tmp_path, "jsonl", TEXTS)
    write(tmp_path, "txt", TEXTS[:2])
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "file.docx").write_text("x")
    with pytest.raises(UserError, match=message) as e:
        FileDocuments(**options | {"paths": str(tmp_path / options["paths"])})
    assert "\n" not in str(e.value)


# ---- data sets in the hub's format


@pytest.fixture(params=["parquet", "jsonl"])
def hub_folder(request, tmp_path) -> str:
    """A data set of 40 documents in four files."""
    for i in range(4):
        glob = Path(write(tmp_path / "part", request.param, [f"document {10 * i + j}" for j in range(10)]))
        (tmp_path / "set").mkdir(exist_ok=True)
        next(glob.parent.glob(glob.name)).rename(tmp_path / "set" / f"train-{i}.{request.param}")
    return str(tmp_path / "set")


def number(document: str) -> int:
    return int(document.split()[1])


@pytest.mark.parametrize("epoch", [0, 1])
def test_hub_splits_are_disjoint_and_cover(hub_folder, epoch, small_windows):
    train = [number(d) for d in texts_of(HubDocuments(hub_folder, TRAIN, held_out_documents=13), epoch)]
    kept = [number(d) for d in texts_of(HubDocuments(hub_folder, HELD_OUT, held_out_documents=13), epoch)]
    assert sorted(kept) == list(range(13))
    assert sorted(train) == list(range(13, 40))
    assert train != sorted(train)


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_hub_streams_continue_at_every_document(hub_folder, split, small_windows):
    """From the state alone, which outlives the process; and a continued stream can be continued again."""
    options = {"split": split, "held_out_documents": 15}

    def continued(piece: Piece) -> list[Piece]:
        place = json.loads(json.dumps(piece.place))
        return list(HubDocuments(hub_folder, **options).pieces(0, place, piece.n))

    whole = list(HubDocuments(hub_folder, **options).pieces(0))
    texts = [piece.text for piece in whole]
    assert whole[-1].place["window"] >= 3
    for n, piece in enumerate(whole):
        rest = continued(piece)
        assert [piece.text for piece in rest] == texts[n:]
        assert [piece.text for piece in continued(rest[len(rest) // 2])] == texts[n + len(rest) // 2 :]


def test_hub_streams_do_not_open_the_files_that_came_before(hub_folder, small_windows):
    last = list(HubDocuments(hub_folder, held_out_documents=5).pieces(0))[-1]
    documents = HubDocuments(hub_folder, held_out_documents=5)
    for file in sorted(Path(hub_folder).iterdir())[:2]:
        file.unlink()
    assert next(documents.pieces(0, last.place, last.n)) == last
    with pytest.raises(UserError, match=r"the shard train-0\.\w+ of data\.path=\S+ cannot be read .* same command"):
        next(documents.pieces(0))


def test_hub_passes_differ_by_seed_and_pass(hub_folder):
    orders = [
        tuple(texts_of(HubDocuments(hub_folder, seed=seed, held_out_documents=5), epoch))
        for seed, epoch in [(0, 1), (0, 2), (1, 1), (0, 1)]
    ]
    assert orders[0] == orders[3]
    assert len(set(orders)) == 3


FORMATS = {
    "openwebtext": ({"text": "a b"}, "a b"),
    "fineweb": ({"text": "a b", "id": "x", "dump": "CC", "language": "en", "token_count": 2}, "a b"),
    "ultra_fineweb": ({"content": "a b", "score": 0.9, "source": "fineweb"}, "a b"),
    "mathinstruct": ({"source": "gsm", "output": "It is 2.", "instruction": "1 + 1?"}, "1 + 1?\n\nIt is 2."),
    "alpaca": ({"instruction": "Add.", "input": "", "output": "2", "id": 1}, "Add.\n\n2"),
    "one of a kind": ({"saying": "a b", "year": 1900}, "a b"),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_columns_of_known_data_sets_are_found(name, kind, tmp_path):
    import pandas as pd

    row, text = FORMATS[name]
    table = pd.DataFrame([row] * 4)
    table.to_parquet(tmp_path / "a.parquet") if kind == "parquet" else table.to_json(
        tmp_path / "a.jsonl", orient="records", lines=True
    )
    assert texts_of(HubDocuments(str(tmp_path), held_out_documents=1)) == [text] * 3
    assert FileDocuments(str(tmp_path / f"a.{kind}"))[0] == text
    preset = CONF / "data" / f"{name}.yaml"
    if preset.is_file():
        columns = OmegaConf.load(preset).get("column")
        assert texts_of(HubDocuments(str(tmp_path), held_out_documents=1, column=columns)) == [text] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "txet"}, r"column=txet .*\['text'\]"),
        ({"hub_split": "trian"}, "trian"),
        ({"name": "no-such-subset"}, "no-such-subset"),
    ],
)
def test_mistakes_in_hub_data_sets(hub_folder, options, message):
    with pytest.raises(UserError, match=message) as e:
        HubDocuments(hub_folder, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("path", ["acme/no-such-data-set", "/no/such/folder"])
def test_no_such_data_set_or_no_network(path, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"'{path}' cannot be loaded .* data=stdlib") as e:
        HubDocuments(path)
    assert time.perf_counter() - start < 10  # `datasets` by itself retries for 23 seconds
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_a_hub_data_set_is_read_at_the_commit_that_its_revision_names(hub_folder, monkeypatch):
    """So what is read cannot change behind a run's back, and a cache knows by the commit what it was made from."""
    import datasets

    read_at = {}

    def load_dataset_builder(path, revision, **options):
        read_at[path] = revision
        return real(hub_folder, **options)

    real = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    commits = {None: "c0ffee", "v1": "beef"}
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info",
        lambda self, path, revision, timeout: SimpleNamespace(sha=commits[revision]),
    )
    for revision, commit in commits.items():
        assert HubDocuments("acme/text", revision=revision).digest() == commit == read_at["acme/text"]
    assert HubDocuments(hub_folder).digest() == ""


def test_reading_is_quiet_and_restores_the_settings(tmp_path, capfd):
    import datasets

    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    read(FileDocuments(write(tmp_path, "jsonl", TEXTS)))
    assert capfd.readouterr() == ("", "")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before


def test_held_out_text_does_not_depend_on_the_seed():
    """Runs of different seeds are judged on the same text; their training text comes in different orders."""
    first = {
        (split, seed): next(StdlibDocuments(split, seed).pieces(0)).text
        for split in (TRAIN, HELD_OUT)
        for seed in (0, 1)
    }
    assert first[HELD_OUT, 0] == first[HELD_OUT, 1]
    assert first[TRAIN, 0] != first[TRAIN, 1]


def test_a_listing_is_as_long_as_its_source_and_the_same_every_time():
    source, listings, both = (
        StdlibDocuments(HELD_OUT),
        DisassembledStdlib(HELD_OUT),
        DisassembledStdlib(HELD_OUT, mixed=True),
    )
    n = len(source)
    assert len(listings) == n
    assert len(both) == 2 * n
    assert both[n + 3] == source[3]
    assert both[3] == listings[3] == listings[3]
    assert len(listings[3]) <= len(source[3])
    assert "LOAD_" in listings[3]
    assert " at 0x" not in "".join(listings[i] for i in range(8))


def test_a_module_that_does_not_compile_is_an_empty_document():
    assert disassemble("def f(:") == ""
    assert "RETURN" in disassemble("x = 1")
