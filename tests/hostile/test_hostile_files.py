"""Files of strangers and of other libraries: what they ask for is not run, taken from elsewhere, or given memory."""

import io
import json
import pickle
import resource
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build
from damage import KINDS, damage
from safetensors.torch import load_file, save_file

from sae_lab import load_sae
from sae_lab.interop import download, sparsify
from sae_lab.runs.checkpoint import check_readable, origin_of
from sae_lab.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "interop" / "fixtures"
GS, DL, OA = "gemma_scope/jumprelu", "dictionary_learning/BatchTopKSAE", "openai/topk"
SP, SL = "sparsify/topk", "sae_lens/standard"
SAES = {
    SP: ("cfg.json", "sae.safetensors"),
    SL: ("cfg.json", "sae_weights.safetensors"),
    DL: ("config.json", "ae.pt"),
    GS: ("params.npz",),
    OA: ("8.pt",),
}
FOREIGN = {
    "cfg.json": DL + "/config.json",
    "config.json": SL + "/cfg.json",
    "sae.safetensors": SL + "/sae_weights.safetensors",
    "sae_weights.safetensors": SP + "/sae.safetensors",
    "ae.pt": OA + "/8.pt",
    "8.pt": DL + "/ae.pt",
    "params.npz": DL + "/ae.pt",
}
"""A file of another library to put in the place of each file."""
DAMAGED = [
    (case, name, kind)
    for case, names in SAES.items()
    for name in names
    for kind in KINDS
    if not (kind.startswith("flip") and name.endswith((".json", ".safetensors")))
]
"""Archives have checksums. In safetensors and JSON, a flip in a number cannot be noticed without digests."""


class Canary:
    """Unpickled by anything that runs code, it leaves the file `ran`."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextmanager
def at_most(megabytes: int):
    """Let this process take so many megabytes more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def copy(case: str) -> Path:
    """A fixture in the working folder: a folder, or for OpenAI a file."""
    folder = Path(shutil.copytree(FIXTURES / case, "sae"))
    if case.startswith("openai"):
        return next(folder.glob("*.pt")).rename(folder / "8.pt")
    return folder


def assert_told(source: Path, **arguments) -> str:
    """Loading is one sentence, takes little memory and runs and writes nothing."""
    before = sorted(Path().rglob("*"))
    with at_most(200), pytest.raises(UserError) as told:
        load_sae(source, **arguments)
    assert "\n" not in str(told.value)
    assert sorted(Path().rglob("*")) == before
    return str(told.value)


def zipped(file: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def npy(shape: tuple[int, ...], content: bytes = b"", descr: str = "<f4") -> bytes:
    """A .npy that declares a shape and holds `content`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + content


def rewrite(file: Path, **arrays) -> None:
    """Replace arrays of the .npz."""
    with np.load(file) as there:
        np.savez(file, **{**dict(there), **arrays}, allow_pickle=True)


def repickle(file: Path, **values) -> None:
    torch.save(torch.load(file, weights_only=True) | values, file)


def deflated(file: Path) -> None:
    """Pack a torch archive again, one of its tensors as gigabytes of zeros."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if "/data/" in name)
    zipped(file, parts | {name: bytes(2**28)}, zipfile.ZIP_DEFLATED)


def legacy(file: Path) -> None:
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def sparse_file(file: Path, gigabytes: int) -> None:
    """A safetensors file of zeros that take no room on the disk."""
    n = gigabytes * 2**30
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [n // 4], "data_offsets": [0, n]}}).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + n)


def hollow() -> torch.Tensor:
    """A sparse tensor of 10^12 numbers."""
    return torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (10**12,), check_invariants=False)


def nested(depth: int = 200_000) -> str:
    return "[" * depth + "]" * depth


def set_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


NPY_1 = b"\x93NUMPY\x01\x00"
HOSTILE = {
    "npz: a pickle": (GS, lambda f: rewrite(f / "params.npz", b_enc=np.array([Canary()], dtype=object))),
    "npz: a pickle beside it": (GS, lambda f: rewrite(f / "params.npz", x=np.array([Canary()], dtype=object))),
    "npz: a bare pickle": (GS, lambda f: (f / "params.npz").write_bytes(pickle.dumps(Canary()))),
    "npz: 8 GB of nothing": (GS, lambda f: zipped(f / "params.npz", {"W_dec.npy": npy((2**21, 2**10))})),
    "npz: 256 MB of zeros in 256 KB": (
        GS,
        lambda f: zipped(f / "params.npz", {"W_dec.npy": npy((2**16, 2**10), bytes(2**28))}, zipfile.ZIP_DEFLATED),
    ),
    "npz: a shape whose product is 0": (GS, lambda f: zipped(f / "params.npz", {"W_dec.npy": npy((0, 2**62))})),
    "npz: a negative shape": (GS, lambda f: zipped(f / "params.npz", {"W_dec.npy": npy((-1, 4))})),
    "npz: strings": (GS, lambda f: rewrite(f / "params.npz", b_enc=np.array(["x" * 16] * 16))),
    "npz: a path for a name": (GS, lambda f: zipped(f / "params.npz", {"../../W_dec.npy": npy((1,), b"1234")})),
    "npz: brackets": (GS, lambda f: zipped(f / "params.npz", {"W_dec.npy": NPY_1 + b"\x60\xea" + b"(" * 60_000})),
    "pt: a pickle": (DL, lambda f: torch.save({"b_dec": Canary()}, f / "ae.pt")),
    "pt: a bare pickle": (DL, lambda f: (f / "ae.pt").write_bytes(pickle.dumps(Canary()))),
    "pt: the format before zip": (DL, lambda f: legacy(f / "ae.pt")),
    "pt: compressed": (DL, lambda f: deflated(f / "ae.pt")),
    "pt: 10^12 elements that share one": (DL, lambda f: repickle(f / "ae.pt", b_dec=torch.ones(1).expand(10**12))),
    "pt: no memory at all": (DL, lambda f: repickle(f / "ae.pt", b_dec=torch.ones(10**12, device="meta"))),
    "pt: sparse": (DL, lambda f: repickle(f / "ae.pt", b_dec=hollow())),
    "pt: module": (DL, lambda f: torch.save(torch.nn.Linear(2, 2), f / "ae.pt")),
    "openai: a pickle": (OA, lambda f: torch.save({"activation": Canary()}, f)),
    "openai: 10^12 elements that share one": (OA, lambda f: repickle(f, latent_bias=torch.ones(1).expand(10**12))),
    "openai: a k of 10^30": (OA, lambda f: repickle(f, activation_state_dict={"k": 10**30})),
    "safetensors: a file of 4 TB without content": (SP, lambda f: sparse_file(f / "sae.safetensors", 4096)),
    "safetensors: a header of 2^56 bytes": (SP, lambda f: (f / "sae.safetensors").write_bytes(bytes(7) + b"\x01{}")),
    "safetensors: a pickle": (SP, lambda f: (f / "sae.safetensors").write_bytes(pickle.dumps(Canary()))),
    "json: brackets": (SP, lambda f: (f / "cfg.json").write_text('{"k": ' + nested() + "}")),
    "json: a gigabyte": (SP, lambda f: (f / "cfg.json").open("wb").truncate(2**30)),
    "json: a number of 10^5 digits": (SP, lambda f: (f / "cfg.json").write_text('{"k": ' + "9" * 10**5 + "}")),
    "json: width 10^30": (SP, lambda f: set_json(f / "cfg.json", d_in=10**30)),
    "json: infinity": (SP, lambda f: (f / "cfg.json").write_text('{"d_in": 8, "num_latents": Infinity, "k": 4}')),
    "json: k below 0": (SP, lambda f: set_json(f / "cfg.json", k=-(10**30))),
    "json: expansion of a list": (SP, lambda f: set_json(f / "cfg.json", num_latents=None, expansion_factor=[1])),
    "json: an architecture by path": (SL, lambda f: set_json(f / "cfg.json", architecture="os.system")),
    "json: a scale by path": (SL, lambda f: set_json(f / "cfg.json", activation_fn="../../x")),
    "json: groups of 2^60": (
        "sae_lens/matryoshka_batchtopk_training",
        lambda f: set_json(f / "cfg.json", matryoshka_widths=[1, 2**60]),
    ),
    "json: a class by path": (DL, lambda f: set_json(f / "config.json", trainer={"dict_class": "builtins.exec"})),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_stopped(name):
    case, prepare = HOSTILE[name]
    source = copy(case)
    prepare(source)
    assert_told(source)
    assert not Path("ran").exists()


@pytest.mark.parametrize("sae_id", ["../elsewhere", "layer/../../elsewhere", "ABSOLUTE"])
def test_the_id_of_an_sae_stays_in_its_folder(sae_id):
    shutil.copytree(FIXTURES / SP, "elsewhere")
    Path("folder", "layer").mkdir(parents=True)
    sae_id = str(Path("elsewhere").resolve()) if sae_id == "ABSOLUTE" else sae_id
    assert "leads out of its folder" in assert_told(Path("folder"), sae_id=sae_id)


def test_a_release_that_names_a_path_outside_is_not_downloaded(monkeypatch):
    entry = download.Entry("somebody/saes", "../../elsewhere")
    monkeypatch.setattr(download, "find_entry", lambda *_: entry)
    monkeypatch.setattr(download, "download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(UserError, match="leads out of its folder"):
        load_sae("somebody/saes", sae_id="x")


@pytest.mark.parametrize("payload", ["pickle", "zip", "part of a checkpoint", "compressed"])
def test_a_checkpoint_runs_nothing(payload):
    file = Path("last.ckpt")
    good = {"global_step": 3, "state_dict": {}, "pytorch-lightning_version": "2.6.6"}
    if payload == "pickle":
        file.write_bytes(pickle.dumps(Canary()))
    elif payload == "compressed":
        zipped(file, {"last/data.pkl": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    else:
        torch.save(Canary() if payload == "zip" else good | {"ActivationData": {"origin": Canary()}}, file)
    for read in (lambda: check_readable(file, "type resume=never."), lambda: origin_of(file, "ActivationData")):
        with at_most(200), pytest.raises(UserError, match="cannot be read"):
            read()
    assert not Path("ran").exists()


def is_told(source: Path) -> bool:
    try:
        load_sae(source)
    except UserError as told:
        return "\n" not in str(told)
    return False


def state_of(sae) -> dict:
    return {"config": sae.config} | {name: tensor.tolist() for name, tensor in sae.state_dict().items()}


@pytest.mark.parametrize(("case", "name", "kind"), DAMAGED)
def test_damage_that_can_be_noticed_without_digests_is_told(case, name, kind):
    source = copy(case)
    file = source if source.is_file() else source / name
    before = state_of(load_sae(source))
    damage(file, kind, (FIXTURES / FOREIGN[name]).read_bytes())
    if kind.startswith("flip") or (kind == "longer" and file.suffix in (".pt", ".npz")):
        assert is_told(source) or state_of(load_sae(source)) == before  # a date in the archive, or what is before it
    else:
        assert_told(source)


@pytest.mark.parametrize("bit", range(0, 8 * 8 * 40, 40))
def test_a_flip_in_the_header_of_safetensors_is_told(bit):
    source = copy(SP)
    file = source / "sae.safetensors"
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    at = bit // 8 % length
    before = state_of(load_sae(source))
    content[at] ^= 1 << bit % 8
    file.write_bytes(content)
    assert is_told(source) or state_of(load_sae(source)) == before  # white space


def test_an_sae_of_another_library_says_that_it_cannot_be_checked(caplog):
    load_sae(copy(SP))
    assert caplog.text.count("has no digests") == 1


def test_an_export_of_ours_says_so_too(caplog):
    sparsify.write(build("topk", "sae.normalize=none").eval(), Path("out"), {})
    load_sae("out")
    assert caplog.text.count("has no digests") == 1
    tensors = load_file("out/sae.safetensors")
    save_file(tensors | {"b_dec": tensors["b_dec"][:-1].clone()}, "out/sae.safetensors")
    assert "b_dec" in assert_told(Path("out"))
