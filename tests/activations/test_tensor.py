"""data=tensor: rows of files of anyone as they are, each once per pass, exact on resume; refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, equal
from safetensors.torch import save_file

from sae_lab.activations.building import build_data
from sae_lab.activations.tensor import TensorData
from sae_lab.activations.tensor_files import TensorFiles
from sae_lab.lm.none import NoLM
from sae_lab.runtime.errors import UserError

N, D = 1000, 6
X = torch.arange(N * D, dtype=torch.float32).view(N, D)
SETTINGS = {
    "key": None,
    "axes": "auto",
    "held_out_every": 10,
    "batch_size": 64,
    "n_tokens": 4096,
    "block_tokens": 256,
    "prefetch": False,
    "repeat": True,
    "n_eval_tokens": 64,
    "n_val_tokens": 32,
    "seed": 0,
}


def data(path: Path, **changes) -> TensorData:
    return TensorData(NoLM("cpu"), str(path), **(SETTINGS | changes))


def shards(folder: Path) -> Path:
    """The rows of X in a folder of three files of different kinds, one of which is in a subfolder."""
    (folder / "shards" / "b").mkdir(parents=True)
    torch.save({"acts": X[:300]}, folder / "shards" / "a.pt")
    save_file({"x": X[300:301].clone()}, folder / "shards" / "b" / "1.safetensors")
    np.save(folder / "shards" / "c.npy", X[301:].numpy())
    (folder / "shards" / "README.md").write_text("not activations")
    return folder / "shards"


def saved(folder: Path, kind: str) -> tuple[Path, dict]:
    """A file with the rows of X, and the settings that it needs."""
    file, settings = folder / f"acts.{kind.split()[0]}", {}
    match kind:
        case "pt" | "pth":
            torch.save(X, file)
        case "pt of before 1.6":
            torch.save(X, file, _use_new_zipfile_serialization=False)
        case "pt, a parameter":
            file = folder / "acts.pt"
            torch.save(torch.nn.Parameter(X), file)
        case "pt, a list":
            file = folder / "acts.pt"
            torch.save([X[:10], X[10:10], X[10:]], file)
        case "pt, a dict":
            file, settings = folder / "acts.pt", {"key": "layers.3"}
            torch.save({"layers": {3: X, 4: -X}, "labels": torch.arange(N), "model": "gpt2"}, file)
        case "pt, (n, t, d)":
            file, settings = folder / "acts.pt", {"axes": "ntd"}
            torch.save(X.view(10, 100, D), file)
        case "pt, transposed":
            file = folder / "acts.pt"
            torch.save(X.T.clone().T, file)
        case "safetensors":
            save_file({"acts": X}, file)
        case "npy":
            np.save(file, X.numpy())
        case "npy, Fortran order":
            file = folder / "acts.npy"
            np.save(file, np.asfortranarray(X.numpy()))
        case "folder":
            file = shards(folder)
    return file, settings


KINDS = (
    *("pt", "pth", "pt of before 1.6", "pt, a parameter", "pt, a list", "pt, a dict", "pt, (n, t, d)"),
    *("pt, transposed", "safetensors", "npy", "npy, Fortran order", "folder"),
)


@pytest.fixture(scope="module")
def of_pt(tmp_path_factory) -> list[torch.Tensor]:
    """20 batches of a .pt file."""
    stream = data(saved(tmp_path_factory.mktemp("pt"), "pt")[0]).new_stream()
    return [next(stream).clone() for _ in range(20)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_batches(kind, tmp_path, of_pt):
    file, settings = saved(tmp_path, kind)
    d = data(file, **settings)
    assert torch.equal(d.files.rows([range(N)]), X.unsqueeze(1))
    stream = d.new_stream()
    assert all(torch.equal(next(stream), batch) for batch in of_pt)


def rows(d: TensorData, **changes) -> torch.Tensor:
    """The first number of every row of one pass, which tells the rows of X apart."""
    stream = d.new_stream()
    return torch.cat([batch[:, 0, 0].clone() for batch in stream]) / D


def test_a_pass_has_every_training_row_once_and_no_held_out_one(tmp_path):
    d = data(saved(tmp_path, "pt")[0], repeat=False)
    every = d.held_out(10**6)
    held_out = torch.cat([every.read(part).x for part in every.parts])[:, 0, 0] / D
    assert len(held_out) == 100
    assert sorted([*rows(d).tolist(), *held_out.tolist()]) == list(range(N))
    mean_distance = rows(d).diff().abs().mean()
    assert 0.8 < mean_distance / (N / 3) < 1.2  # shuffled: that of random pairs is n/3
    other = data(saved(tmp_path, "pt")[0], repeat=False, seed=1)
    assert not torch.equal(rows(other), rows(d))
    assert other.held_out(50).parts == d.held_out(50).parts


def test_exactly_as_many_rows_are_held_out_as_are_asked_for(tmp_path):
    torch.save(torch.zeros(20_000, 2), tmp_path / "acts.pt")
    d = data(tmp_path / "acts.pt", n_val_tokens=300)
    assert len(d.validation_rows()) == 300
    for asked, found in ((1, 1), (1500, 1500), (1536, 1536), (5000, 15 * 128)):
        held_out = d.held_out(asked)
        assert (held_out.n_tokens, held_out.too_few) == (found, found < asked)
        assert sum(len(held_out.read(part).x) for part in held_out.parts) == found
    more = [row for part in d.held_out(1500).parts for r in part for row in r]
    assert [row for part in d.held_out(1400).parts for r in part for row in r] == more[:1400]


def test_passes_differ_and_a_stream_continues_at_any_batch(tmp_path):
    d = data(saved(tmp_path, "folder")[0], prefetch=True)
    stream, batches, states = d.stream, [], []
    for _ in range(40):  # 2.8 passes
        states.append(stream.state_dict())
        batches.append(next(stream).clone())
    assert not torch.equal(batches[0], batches[14])
    for i in (1, 13, 14, 15, 31):
        stream.load_state_dict(states[i])
        assert all(torch.equal(next(stream), batch) for batch in batches[i : i + 5])
    stream.close()


@pytest.mark.parametrize(
    ("saved_as", "kept_as"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)],
)
def test_dtypes_are_kept_or_converted_and_said(saved_as, kept_as, tmp_path, caplog):
    caplog.set_level("INFO")
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(saved_as)
    torch.save(x, tmp_path / "acts.pt")
    d = data(tmp_path / "acts.pt")
    assert next(d.new_stream()).dtype == d.dtype == kept_as
    assert torch.equal(d.files.rows([range(N)])[:, 0], x.to(kept_as))
    assert ("float64, converted to float32" in caplog.text) == (saved_as == torch.float64)
    assert "acts.pt: 1,000 rows of 1 × 6 (sources × width)" in caplog.text
    assert "; 100 are held out, and n_tokens are 4.55 passes over the others." in caplog.text


def test_few_rows_for_their_width_are_warned_of(tmp_path, caplog):
    torch.save(X[:600].T.clone().repeat(4, 1), tmp_path / "acts.pt")
    data(tmp_path / "acts.pt", batch_size=8, n_tokens=8)
    sentence = "acts.pt has 24 rows of width 600, fewer than twice the width: if the axes are the wrong way round, save"
    assert f"{sentence} x.T" in caplog.text
    caplog.clear()
    torch.save(X[:12], tmp_path / "acts.pt")
    data(tmp_path / "acts.pt", batch_size=8, n_tokens=8)
    assert not caplog.text


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path, "pt")
    d = data(Path("~/acts.pt"))
    assert (d.sites, len(d.files)) == (("acts",), N)
    assert data(Path("~") / shards(tmp_path).name).sites == ("shards",)
    with pytest.raises(UserError, match=r"path=~nobody-of-this-name/acts\.pt does not exist"):
        data(Path("~nobody-of-this-name/acts.pt"))


def test_files_of_several_dtypes_become_float32(tmp_path):
    torch.save(X.half(), tmp_path / "a.pt")
    torch.save(X.bfloat16(), tmp_path / "b.pt")
    assert TensorFiles(str(tmp_path), None, "auto").dtype == torch.float32


def test_sources_and_positions(tmp_path):
    x = torch.randn(50, 4, 2, D)
    torch.save(x, tmp_path / "acts.pt")
    d = data(tmp_path / "acts.pt", axes="ntsd")
    assert (d.n_sources, d.d_in, d.sites) == (2, D, ("acts.0", "acts.1"))
    assert torch.equal(d.files.rows([range(200)]), x.flatten(0, 1))
    torch.save(x[:, 0], tmp_path / "acts.pt")
    assert torch.equal(data(tmp_path / "acts.pt", axes="nsd", batch_size=8).files.rows([range(50)]), x[:, 0])
    torch.save(x[:, :, 0], tmp_path / "acts.pt")
    assert data(tmp_path / "acts.pt", axes="ntd").sites == ("acts",)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_file_larger_than_the_memory_is_mapped(kind, tmp_path):
    n, d = 2**25, 4096  # 512 GiB, all of it a hole in a file
    file = tmp_path / f"huge.{kind}"
    if kind == "npy":
        np.lib.format.open_memmap(file, "w+", np.float32, (n, d))
    else:
        header = json.dumps({"x": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, 4 * n * d]}}).encode()
        header += b" " * (-len(header) % 8)
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(file, 8 + len(header) + 4 * n * d)
    huge = data(file)
    assert len(huge.files) == n
    assert not next(huge.new_stream()).any()


class Code:
    def __reduce__(self):
        return (print, ("run",))


NAN, INF = X.clone(), X.double()
NAN[123, 2], INF[999, 0] = torch.nan, 1e300
REFUSED = {
    "no file": (lambda f: None, {}, r"data\.path=.*acts\.pt does not exist: give a file"),
    "an unknown ending": (lambda f: f.with_suffix(".h5").touch(), {"path": "acts.h5"}, r"none of \.pt.*torch\.save"),
    "an empty folder": (lambda f: f.mkdir(), {}, r"is a folder without activations: it must hold \.pt"),
    "an empty file": (lambda f: f.touch(), {}, r"acts\.pt cannot be read .*: save it again\."),
    "a cut file": (lambda f: (torch.save(X, f), f.write_bytes(f.read_bytes()[:9000])), {}, "cannot be read"),
    "code": (lambda f: torch.save(Code(), f), {}, r"holds more than plain tensors, .*save the tensor alone"),
    "TorchScript": (lambda f: torch.jit.script(torch.nn.ReLU()).save(f), {}, "holds more than plain tensors"),
    "text": (lambda f: f.write_text("hello"), {}, r"acts\.pt is no \.pt file: save the tensor with torch\.save\(x, "),
    "a pointer of Git LFS": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        {},
        r"acts\.pt is a pointer of Git LFS and not the file: run git lfs pull\.",
    ),
    "a broken pickle": (lambda f: f.write_bytes(b"\x80\x02hello"), {}, r"acts\.pt cannot be read .*: save it again\."),
    "a nested tensor": (
        lambda f: torch.save(torch.nested.nested_tensor([X[:2], X[:4]]), f),
        {},
        r"holds a nested tensor: save its rows one after the other \(torch\.cat\(x\.unbind\(\)\)\)",
    ),
    "a meta tensor": (lambda f: torch.save(X.to("meta"), f), {}, "the meta device, which has no numbers: save the act"),
    "no tensor": (lambda f: torch.save({"a": 1}, f), {}, "holds no tensor but a dict"),
    "several tensors": (
        lambda f: torch.save({"a": X, "b": {"c": X}}, f),
        {},
        r"holds several tensors \(a, b\.c\): choose one with data\.key=NAME",
    ),
    "an unknown key": (lambda f: torch.save({"a": X}, f), {"key": "b"}, r"data\.key=b is not in .*: choose among a\."),
    "a key of one tensor": (lambda f: torch.save(X, f), {"key": "b"}, r"data\.key=b is not in .*: leave it out\."),
    "integers": (lambda f: torch.save(X.long(), f), {}, r"holds int64 of shape \(1000, 6\), no activations"),
    "booleans": (lambda f: torch.save(X > 0, f), {}, "holds bool of shape"),
    "complex numbers": (lambda f: torch.save(X.to(torch.complex64), f), {}, "holds complex64 of shape"),
    "a sparse tensor": (lambda f: torch.save(X.to_sparse(), f), {}, "holds sparse_coo of shape"),
    "one axis": (lambda f: torch.save(X[0], f), {}, r"shape \(6,\), but data\.axes=auto stands for \(n, d\)"),
    "three axes": (
        lambda f: torch.save(X.view(10, 100, D), f),
        {},
        r"shape \(10, 100, 6\): type data\.axes=nsd if axis 1 is sites \(or models\), or ntd if it is positions",
    ),
    "four axes": (lambda f: torch.save(X.view(10, 50, 2, D), f), {}, r"type data\.axes=ntsd\."),
    "two axes instead of three": (lambda f: torch.save(X, f), {"axes": "nsd"}, r"axes=nsd stands for \(n, s, d\)"),
    "no rows": (lambda f: torch.save(X[:0], f), {}, "holds no rows: give a file with at least one activation"),
    "no width": (lambda f: torch.save(X[:, :0], f), {}, "its activations have no numbers"),
    "one row": (
        lambda f: torch.save(X[:1], f),
        {},
        r"holds 1 rows, too few to hold out one in data\.held_out_every=10",
    ),
    "widths that differ": (
        lambda f: (f.mkdir(), torch.save(X, f / "a.pt"), torch.save(X[:, :4], f / "b.pt")),
        {},
        r"b\.pt has 1 × 4 numbers in a row \(sources × width\), and .*a\.pt has 1 × 6",
    ),
    "numpy's objects": (
        lambda f: np.save(f.with_suffix(".npy"), np.array([{}, 1]), allow_pickle=True),
        {"path": "acts.npy"},
        "cannot be read",
    ),
    "the other byte order": (
        lambda f: np.save(f.with_suffix(".npy"), X.numpy().astype(">f4")),
        {"path": "acts.npy"},
        r"holds >f4 numbers, which torch does not read: save x\.astype",
    ),
    "cut safetensors": (
        lambda f: f.with_suffix(".safetensors").write_bytes(b"\x08\0\0\0"),
        {"path": "acts.safetensors"},
        "cannot be read",
    ),
    "safetensors with a list for a header": (
        lambda f: f.with_suffix(".safetensors").write_bytes(b"\x08" + bytes(7) + b"[1, 2]  "),
        {"path": "acts.safetensors"},
        r"acts\.safetensors cannot be read .*: save it again\.",
    ),
    "NaN": (lambda f: torch.save(NAN, f), {}, r"acts\.pt has nan in row 123 \(counted from 0\): leave such rows out"),
    "infinity after a conversion": (lambda f: torch.save(INF, f), {"held_out_every": 1000}, r"has inf in row 999 "),
    "a typo in axes": (
        lambda f: torch.save(X, f),
        {"axes": "n"},
        r"data\.axes=n is not known: choose auto, nd, nsd, ntd or ntsd",
    ),
}


def read_all(d: TensorData) -> None:
    d.read(range(d.pieces.n))


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_activations_is_refused_in_a_sentence(name, tmp_path):
    make, settings, sentence = REFUSED[name]
    make(tmp_path / "acts.pt")
    path = tmp_path / settings.get("path", "acts.pt")
    keys = [f"data.{key}={value}" for key, value in settings.items() if key != "path"]
    with pytest.raises(UserError, match=sentence) as refused:
        read_all(build_data(compose("data=tensor", f"data.path={path}", "batch_size=64", *keys)))
    assert "\n" not in str(refused.value)


def test_a_language_model_and_activations_exclude_each_other():
    with pytest.raises(
        UserError, match=r"data=tensor reads activations and runs no language model: leave out lm=\.\.\."
    ):
        build_data(compose("data=tensor", "data.path=x.pt", "lm=gpt2"))
    with pytest.raises(UserError, match=r"lm=none has no activations: leave it out"):
        build_data(compose("lm=none"))


def test_a_choice_of_tensors_brings_its_own_language_model_everywhere():
    for config in ("train", "harvest", "throughput"):
        assert compose("data=tensor", config_name=config).lm._target_ == "sae_lab.lm.none.NoLM"
    assert set(compose("data=tensor").data) - {"_target_"} == {"path", *SETTINGS}


def test_checkpoints_know_the_files(tmp_path):
    file = saved(tmp_path, "pt")[0]
    d = data(file)
    next(d.stream)
    state = d.state_dict()
    same = data(file)
    same.load_state_dict(state)
    assert equal(next(same.stream), next(d.stream))
    torch.save(X + 1, file)
    with pytest.raises(UserError, match="the activations changed since this run began: restore"):
        data(file).load_state_dict(state)


def test_rows_are_cut_into_pieces_that_fit_their_number(tmp_path):
    for n, size in ((10, 1), (999, 9), (20_000, 128)):
        torch.save(torch.zeros(n, 2), tmp_path / "acts.pt")
        d = data(tmp_path / "acts.pt", batch_size=2, n_tokens=2)
        assert d.pieces.size == size
        assert sum(len(d.pieces.rows_of(i)) for i in range(d.pieces.n)) == n
        assert len(d.pieces.held_out) == d.pieces.n // 10
        assert len(d.probe_rows()) == min(16, sum(len(d.pieces.rows_of(i)) for i in d.pieces.held_out))
