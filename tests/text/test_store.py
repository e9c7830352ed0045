"""The store of tokens: its rows, its order, builds that are killed, damage, and text that changed."""

import errno
import json
import logging
import os
import signal
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import UniqueWords, WordIds
from transformers import AutoTokenizer

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.user_cache import user_cache
from sae_lab.text import store_builder
from sae_lab.text.corpora import FileDocuments
from sae_lab.text.documents import IndexedDocuments
from sae_lab.text.encoding import Encoder
from sae_lab.text.packing import Packer
from sae_lab.text.store import FILES, MANIFEST
from sae_lab.text.text import Text

BOS = 0
AWKWARD = [
    [[], [5], [], [1, 2, 3], [4, 5, 6, 7, 8, 9], []],
    [[1, 2, 3], [4, 5, 6], [7]],  # exactly filling rows of 4
    [list(range(1, 40)), [], [41, 42], list(range(50, 57))],
    [[], []],
    [[1]],
    [[1, 2], [3], [4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14]],
]


class ListDocuments(IndexedDocuments):
    def __init__(self, split: str = "train", texts: tuple[str, ...] = (), seed: int = 0):
        super().__init__(seed, split)
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> str:
        return self.texts[i]


def reference_rows(documents: list[list[int]], seq_len: int, pack: bool) -> list[list[int]]:
    """Token by token, as the docstring of Packer says."""
    rows, row = [], [BOS]
    for ids in documents:
        if not pack:
            row = [BOS]
        for i, token in enumerate(ids):
            if pack and i == 0 and len(row) > 1:
                row.append(BOS)
                if len(row) == seq_len:
                    rows, row = [*rows, row], [BOS]
            row.append(token)
            if len(row) == seq_len:
                rows, row = [*rows, row], [BOS]
    return rows


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path / "cache"))


def text_of(documents, seq_len: int = 4, pack: bool = True, tokenizer=None) -> Text:
    return Text(documents, Encoder(tokenizer or WordIds()), BOS, seq_len=seq_len, pack=pack, order="shuffled")


def folders() -> list[Path]:
    return sorted((user_cache() / "tokens").glob("*"))


# ---- packing


@pytest.mark.parametrize("documents", AWKWARD)
@pytest.mark.parametrize("seq_len", [2, 3, 4, 7])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_rows_are_those_of_the_reference_whatever_the_pieces_and_batches(documents, seq_len, pack, piece):
    pieces = [(i == 0, np.array(ids[i : i + piece])) for ids in documents for i in range(0, max(1, len(ids)), piece)]
    packer, rows, starts = Packer(seq_len, BOS, pack, "<u2"), [], []
    for i, one in enumerate(pieces):
        if i % 3 == 2:  # a killed build continues with what it has saved
            state = json.loads(json.dumps(packer.state_dict()))
            packer = Packer(seq_len, BOS, pack, "<u2")
            packer.load_state_dict(state)
        more, placed = packer.add([one])
        rows, starts = rows + more.tolist(), starts + placed
    starts += packer.finish()
    assert rows == reference_rows(documents, seq_len, pack)
    assert len(starts) == len(documents)
    assert packer.n_tokens == sum(map(len, documents))
    flat = np.array(rows).flatten()
    for ids, start in zip(documents, starts, strict=True):
        if ids and start < len(flat) and (pack or len(ids) >= seq_len - 1):
            assert flat[start] == ids[0]


def test_ids_need_two_bytes_only_where_they_fit():
    assert Packer(4, 70_000, True, "<u2").dtype == np.dtype("<u4")
    assert Packer(4, BOS, True, "<u2").dtype == np.dtype("<u2")


# ---- the store


@pytest.mark.parametrize("pack", [True, False])
def test_a_store_holds_all_rows_and_gives_each_once_a_pass(pack, monkeypatch):
    monkeypatch.setattr(store_builder, "TOGETHER", 100)
    monkeypatch.setattr("sae_lab.text.documents.PIECE", 17)
    documents = UniqueWords()
    text = text_of(UniqueWords, 5, pack)
    ids = [[int(word) for piece in cut_by(documents[i], 17) for word in piece.split()] for i in range(len(documents))]
    rows = reference_rows(ids, 5, pack)
    store = text._open("train")
    assert store.read(np.arange(len(store))).tolist() == rows
    assert len(store.starts) == len(documents)
    stream = text.rows("train", repeat=True)
    first, second = stream.take(len(rows)), stream.take(len(rows))
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(rows)
    assert first.tolist() not in (rows, second.tolist())
    assert first.dtype == torch.long
    whole = text.rows("train", repeat=False)
    assert len(whole.take(len(rows) + 10)) == len(rows)
    assert whole.take(3).shape == (0, 5)


def cut_by(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(0, len(text), n)]


def test_a_state_continues_at_every_row_and_the_order_is_that_of_the_seed():
    documents = partial(UniqueWords, seed=3)
    stream = text_of(documents).rows("train", repeat=True)
    states = [stream.state_dict()]
    rows = []
    for n in (1, 5, 200, 300, 2):
        rows.append(stream.take(n))
        states.append(stream.state_dict())
    for i, state in enumerate(states[:-1]):
        resumed = text_of(documents).rows("train", repeat=True)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert torch.equal(resumed.take(len(torch.cat(rows[i:]))), torch.cat(rows[i:]))
    other = text_of(partial(UniqueWords, seed=4))
    assert not torch.equal(other.first_rows(20), text_of(documents).first_rows(20))
    assert torch.equal(other.held_out(20), text_of(documents).held_out(20))
    assert len(folders()) == 2  # training and held-out text, shared by all seeds


@pytest.mark.parametrize(
    ("texts", "pack", "sentence"),
    [
        ((), True, "the data hold no text"),
        (("", " "), True, "the data hold no text"),
        (("1 2", "3"), False, "no document fills a row of seq_len=9: lower seq_len"),
        (("1 2", "3"), True, "the text is shorter than one row of seq_len=9 tokens"),
    ],
)
def test_text_without_a_row_is_named(texts, pack, sentence):
    with pytest.raises(UserError, match=sentence):
        text_of(partial(ListDocuments, texts=texts), 9, pack).rows("train", repeat=True).take(1)


def test_stale_text_is_tokenized_again_and_moved_text_is_the_same(tmp_path):
    """Also where the size and both ends of a file are the same."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("1 2 3 4 " * 300_000)
    before = text_of(partial(FileDocuments, str(folder / "*.txt")))
    identity, rows = before.identity(), before.first_rows(10**6)
    assert text_of(partial(FileDocuments, str(folder / "*.txt"))).identity() == identity
    assert len(folders()) == 2
    folder.rename(tmp_path / "moved")
    moved = text_of(partial(FileDocuments, str(tmp_path / "moved" / "*.txt")))
    assert moved.identity() == identity
    file = tmp_path / "moved" / "0.txt"
    content = file.read_text()
    file.write_text(content[:1_200_000] + "9 " + content[1_200_002:])
    changed = text_of(partial(FileDocuments, str(tmp_path / "moved" / "*.txt")))
    assert changed.identity() != identity
    assert (changed.first_rows(10**6) != rows).sum() > 0


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damage_is_named_in_a_sentence(name):
    text = text_of(UniqueWords)
    text.first_rows(1)
    (folder,) = folders()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    if name == "starts.bin":
        with pytest.raises(UserError, match=r"is damaged \(starts.bin has another digest\): delete that folder"):
            _ = text_of(UniqueWords)._open("train").starts
        return
    with pytest.raises(UserError, match=rf"{folder.name} is damaged \(.*\): delete that folder, and the same command"):
        text_of(UniqueWords).rows("train", repeat=False).take(10**6)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match="is damaged"):
        text_of(UniqueWords).first_rows(1)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "there")

    monkeypatch.setattr(store_builder.StoreBuilder, "build", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\): set the .* SAE_LAB_CACHE"):
        text_of(UniqueWords).first_rows(1)


# ---- builds that are killed, and builds at the same time


class Slow(UniqueWords):
    """Documents that take a while to read, of which a build of several batches is made."""

    def __getitem__(self, i: int) -> str:
        import time

        time.sleep(0.002)
        return super().__getitem__(i)


def build_slowly(cache: str) -> None:
    os.environ["SAE_LAB_CACHE"] = cache
    store_builder.TOGETHER, store_builder.SAVE_SECONDS = 300, 0.0
    logging.basicConfig(level=logging.INFO)
    text_of(Slow).first_rows(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES, MANIFEST)}


@pytest.mark.process
def test_a_killed_build_continues_to_the_same_bytes_and_two_at_once_build_one(tmp_path):
    text_of(Slow).first_rows(1)
    (whole,) = folders()
    context = get_context("fork")
    cache = tmp_path / "killed"
    progress = cache / "tokens" / whole.name / "progress.json"
    for n in range(4):
        process = context.Process(target=build_slowly, args=(str(cache),))
        process.start()
        seen = progress.read_bytes() if progress.is_file() else None
        while process.is_alive() and (not progress.is_file() or progress.read_bytes() == seen):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, n
        assert not (progress.parent / MANIFEST).is_file()
    both = [context.Process(target=build_slowly, args=(str(cache),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert contents(cache / "tokens" / whole.name) == contents(whole)


# ---- ids


HOSTILE = [
    *("<|endoftext|>", "a<|endoftext|>b", "<|endoftext|", " <|endoftext|> ", "", " ", "\n\n", "\x00\x01", "\ufeff"),
    *("é e\u0301", "ﬁ", "\u200b", "👩‍👩‍👧", "𝔘𝔫𝔦", "\r\n\t", "a" * 5000, " " * 3000, "def f(x):\n\treturn x\n" * 50),
    *("<s>[INST]", "</s>", "\udcff".encode("utf-8", "replace").decode(), "ﷺ" * 20, "0" * 777, "<|endoftext|>" * 9),
]


def test_ids_are_those_of_a_call_of_the_tokenizer(tiny_lm_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)
    tokenizer("x" * 99, truncation=True, max_length=3)  # leaves its settings behind
    call = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoder = Encoder(tokenizer)
    assert [own.tolist() for own in encoder(HOSTILE)] == [tokenizer(text, **call)["input_ids"] for text in HOSTILE]
    assert encoder.dtype == np.dtype("<u2")
    assert tokenizer("<|endoftext|>")["input_ids"] == [BOS]  # calls elsewhere are as before
