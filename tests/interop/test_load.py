"""SAEs that other libraries wrote (see write_fixtures.py), and files that must fail with one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lab import load_sae
from sae_lab.interop import download as hub
from sae_lab.interop import sae_lens
from sae_lab.interop.releases import Release
from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import GatedSAE, JumpReLUSAE, PursuitSAE, VanillaSAE
from sae_lab.saes.files import save_sae

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(str(p.parent.relative_to(FIXTURES)) for p in FIXTURES.glob("*/*/expected.safetensors"))


def source(case: str) -> Path:
    """What load_sae is given: the folder, or the one file that OpenAI's format is."""
    folder = FIXTURES / case
    return next(folder.glob("*.pt")) if case.startswith("openai") else folder


def output(sae, x: torch.Tensor) -> torch.Tensor:
    """x_hat, which of a transcoder is of another site than x."""
    return sae.predict(x)[:, 0] if sae.n_inputs else sae.reconstruct(x)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_codes_and_reconstructions_are_the_librarys(case, tmp_path):
    expected = load_file(FIXTURES / case / "expected.safetensors")
    sae = load_sae(source(case))
    assert_same(sae.encode(expected["x"]), expected["code"])
    assert_same(output(sae, expected["x"]), expected["x_hat"])
    assert 0 < l0_per_row(expected["code"]).sum() < expected["code"].numel()
    again = load_sae(save_sae(sae, tmp_path))
    assert torch.equal(output(again, expected["x"]), output(sae, expected["x"]))


def test_there_is_a_fixture_of_every_kind():
    assert len(CASES) == 38
    assert {case.split("/")[0] for case in CASES} == {
        "sae_lens", "dictionary_learning", "sparsify", "gemma_scope", "openai"
    }  # fmt: skip


def test_signed_codes_of_earlier_sparsify_are_read_with_their_signs(tmp_path):
    """Its rule: the k entries of largest |h| of each row, without ReLU."""
    folder = shutil.copytree(source("sparsify/topk"), tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text()) | {"signed": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    sae, x = load_sae(folder), load_file(folder / "expected.safetensors")["x"]
    h = sae.pre_activations(x.unsqueeze(1)).detach()
    kept = h.abs().topk(sae.k).indices
    code = torch.zeros_like(h).scatter(1, kept, h.gather(1, kept))
    assert (code < 0).any()
    assert_same(sae.encode(x), code)


@pytest.mark.parametrize("case", [case for case in CASES if "transcoder" in case])
def test_a_transcoder_reads_one_site_and_predicts_another(case):
    sae = load_sae(source(case))
    assert (sae.n_sources, sae.n_inputs, sae.skip, sae.config["normalize"]) == (2, 1, "skip" in case, "none")


FOLDED = ("sae_lens/standard", "sae_lens/gated_uncentred", "sae_lens/jumprelu", "sae_lens/jumprelu_skip_transcoder")


@pytest.mark.parametrize("case", FOLDED)
def test_folding_the_decoder_norm_scales_codes_and_keeps_x_hat(case):
    """P-62: on demand, with biases and thresholds."""
    expected = load_file(FIXTURES / case / "expected.safetensors")
    norms = load_sae(source(case)).W_dec.detach().flatten(1).norm(dim=1)
    sae = load_sae(source(case), fold_decoder_norm=True)
    torch.testing.assert_close(sae.W_dec.flatten(1).norm(dim=1), torch.ones(16))
    assert_same(sae.encode(expected["x"]), expected["code"] * norms)
    assert_same(output(sae, expected["x"]), expected["x_hat"])


@pytest.mark.parametrize("version", ["legacy", "modern"])
def test_a_model_that_was_processed_is_named(version, tmp_path, caplog):
    """P-65: its activations are others than those of the model as it was published."""
    folder = shutil.copytree(source(SL), tmp_path / "sae")
    for centred in (False, True):
        kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": centred}}
        config = json.loads((folder / "cfg.json").read_text())
        edit(folder, "cfg.json", **kwargs if version == "legacy" else {"metadata": config["metadata"] | kwargs})
        load_sae(folder)
        assert ("lm.compatibility_mode=true" in caplog.text) == centred


class LoudSAE(VanillaSAE):
    """A user's own, with a threshold by a name of its own."""

    pre_activation_parameters = ("b_enc", "least")

    def __init__(self, **vanilla):
        super().__init__(**vanilla)
        self.least = torch.nn.Parameter(torch.full((self.n_latents,), 0.1))

    def activate(self, h):
        return h * (h > self.least)


@pytest.mark.parametrize(
    ("own", "settings"),
    [
        (LoudSAE, {}),
        (VanillaSAE, {"hidden": [8]}),
        (VanillaSAE, {"tied": True}),
        (GatedSAE, {}),
        (JumpReLUSAE, {"k": 3}),
    ],
)
def test_every_sae_whose_latents_decide_alone_is_folded(own, settings, tmp_path):
    """A class says so itself, and what has the units of a code: the package need not know it."""
    sae = own(d_in=6, n_latents=24, seed=1, **settings).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
        if settings.get("hidden"):
            sae.mlp.W_out += torch.rand(24, 8, generator=generator)
    x, norms = torch.randn(50, 6, generator=generator), sae.W_dec.detach().flatten(1).norm(dim=1)
    folded = load_sae(save_sae(sae, tmp_path), fold_decoder_norm=True)
    torch.testing.assert_close(folded.W_dec.flatten(1).norm(dim=1), torch.ones(24))
    assert (norms > 1.1).all()
    assert_same(folded.encode(x), sae.encode(x) * norms)
    assert_same(folded.reconstruct(x), sae.reconstruct(x))


def test_norms_are_not_folded_where_that_would_change_the_choice():
    with pytest.raises(UserError, match="TopKSAE compares latents"):
        load_sae(source("sae_lens/topk"), fold_decoder_norm=True)


def test_a_foreign_sae_is_pursued():
    """A dictionary with rows of any norm: a pursuit of as many latents reconstructs better than its encoder."""
    expected = load_file(FIXTURES / "sae_lens/topk/expected.safetensors")
    found = PursuitSAE.of(load_sae(source("sae_lens/topk")), "orthogonal_matching_pursuit")
    errors = [(y - expected["x"]).square().sum() for y in (found.autoencode(expected["x"])[0], expected["x_hat"])]
    assert errors[0] < 0.5 * errors[1]


def edit(folder: Path, file: str, **change) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))


def retensor(folder: Path, change, file: str = "sae_weights.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def repickle(folder: Path, change) -> None:
    state = torch.load(folder / "ae.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "ae.pt")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/sae_lab_bomb"),))


SL, SP, DL, GS = "sae_lens/standard", "sparsify/topk", "dictionary_learning/BatchTopKSAE", "gemma_scope/jumprelu"
TC, SC = "sae_lens/jumprelu_skip_transcoder", "sparsify/transcoder"
SITES = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}


@pytest.mark.parametrize(
    ("case", "break_it", "sentence"),
    [
        (SL, lambda f: retensor(f, lambda t: t.update(W_skip=torch.ones(8, 8))), "unknown meaning, W_skip"),
        (SL, lambda f: retensor(f, lambda t: t.update(scaling_factor=torch.full((16,), 2.0))), "scaling_factor"),
        (SL, lambda f: retensor(f, lambda t: t.pop("b_enc")), "no tensor 'b_enc'"),
        (SL, lambda f: retensor(f, lambda t: t.update(b_enc=torch.ones(15))), r"shape \(15,\), expected \(16,\)"),
        (SL, lambda f: retensor(f, lambda t: t.update(W_enc=t["W_dec"] + 0)), r"shape \(16, 8\), expected"),
        (SL, lambda f: edit(f, "cfg.json", architecture="abstopk"), "the architecture 'abstopk': it must be one of"),
        (SL, lambda f: edit(f, "cfg.json", metadata=SITES), "a transcoder of architecture 'standard': it must be"),
        (SL, lambda f: edit(f, "cfg.json", d_out=8), "a transcoder of architecture 'standard': it must be"),
        (SL, lambda f: edit(f, "cfg.json", architecture="transcoder"), "no value for 'd_out'"),
        (SL, lambda f: edit(f, "cfg.json", architecture="transcoder", d_out=8), "b_dec belongs to the pred"),
        (TC, lambda f: edit(f, "cfg.json", architecture="crosslayer_transcoder"), "'crosslayer_transcoder': it must"),
        (TC, lambda f: edit(f, "cfg.json", architecture="jumprelu_transcoder"), "unknown meaning, W_skip"),
        (TC, lambda f: edit(f, "cfg.json", d_out=6), "width 6 from width 8: .* the same width"),
        (TC, lambda f: edit(f, "cfg.json", normalize_activations="layer_norm"), "no exact counterpart"),
        (TC, lambda f: edit(f, "cfg.json", activation_fn="tanh-relu"), "the activation 'tanh-relu'"),
        (TC, lambda f: retensor(f, lambda t: t.update(W_dec=torch.ones(16, 3, 8))), r"shape \(16, 3, 8\), expected"),
        (TC, lambda f: retensor(f, lambda t: t.pop("W_skip")), "no tensor 'W_skip'"),
        (SL, lambda f: edit(f, "cfg.json", metadata={}, activation_fn="tanh-relu"), "the activation 'tanh-relu'"),
        (SL, lambda f: edit(f, "cfg.json", normalize_activations="covariance_whitening"), "no exact counterpart"),
        (SL, lambda f: edit(f, "cfg.json", normalize_activations="expected_average_only_in"), "not the factor of its"),
        (SL, lambda f: (f / "cfg.json").write_text("{"), "cannot be read as a JSON object"),
        (SL, lambda f: (f / "sae_weights.safetensors").write_bytes(b"1234"), "cannot be read as safetensors"),
        (SL, lambda f: (f / "sae_weights.safetensors").unlink(), "holds no config.json"),
        (SP, lambda f: edit(f, "cfg.json", skip_connection=True), "skip_connection without transcode"),
        (SC, lambda f: edit(f, "cfg.json", skip_connection=True), "no tensor 'W_skip'"),
        (SP, lambda f: edit(f, "cfg.json", activation="groupmax"), "the activation 'groupmax'"),
        (SP, lambda f: retensor(f, lambda t: t.update(x=torch.ones(1)), "sae.safetensors"), "unknown meaning, x"),
        (DL, lambda f: edit(f, "config.json", trainer={"dict_class": "os.system"}), "dict_class 'os.system': it"),
        (DL, lambda f: edit(f, "config.json", trainer={"dict_class": "BatchTopKSAE", "k": 5}), "k=4, but .* k=5"),
        (DL, lambda f: repickle(f, lambda t: t.pop("threshold")), "no tensor 'threshold'"),
        (DL, lambda f: repickle(f, lambda t: t.update(extra=torch.ones(1))), "unknown meaning, extra"),
        (DL, lambda f: torch.save({"b_dec": Bomb()}, f / "ae.pt"), "a pickle that would run code"),
        (DL, lambda f: repickle(f, lambda t: t.update(b_dec="x")), "'b_dec' of .* is not a tensor of finite numbers"),
        (DL, lambda f: edit(f, "config.json", trainer="x"), "holds an invalid value"),
        (SL, lambda f: retensor(f, lambda t: t["W_enc"][0, :1].fill_(torch.nan)), "not a tensor of finite numbers"),
        (SL, lambda f: edit(f, "cfg.json", architecture=["standard"]), "holds an invalid value"),
        (SL, lambda f: edit(f, "cfg.json", metadata={}, sae_lens_version="dev"), "holds an invalid value"),
        (SP, lambda f: edit(f, "cfg.json", k=100), "k=100 must lie between 1 and the dictionary's 16 latents"),
        (GS, lambda f: np.savez(f / "params.npz", W_dec=np.array([Bomb()], dtype=object)), "as plain arrays"),
    ],
)  # fmt: skip
def test_files_that_must_fail(case, break_it, sentence, tmp_path):
    folder = shutil.copytree(FIXTURES / case, tmp_path / "sae")
    break_it(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/sae_lab_bomb").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "Tanh"}, "the activation Tanh"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "TopK .*Identity"),
        ({"activation_state_dict": {}}, "no value for 'k'"),
        ({"activation_state_dict": 5}, "holds an invalid value"),
    ],
)
def test_openai_files_of_another_activation_fail(change, sentence, tmp_path):
    torch.save(torch.load(source("openai/topk"), weights_only=True) | change, tmp_path / "8.pt")
    with pytest.raises(UserError, match=sentence):
        load_sae(tmp_path / "8.pt")


def test_a_scale_of_zero_is_told(tmp_path):
    folder = shutil.copytree(source("sae_lens/standard_scaled"), tmp_path / "sae")
    edit(folder, sae_lens.SCALER, scaling_factor=0)
    with pytest.raises(UserError, match="holds an invalid value"):
        load_sae(folder)


def test_a_transcoder_of_gemma_scope_is_known_by_its_path(tmp_path):
    folder = shutil.copytree(FIXTURES / GS, tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1")
    assert load_sae(folder).n_inputs == 1


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one release, and a hub that holds a fixture."""
    saes = [{"one": "standard_scaled"}]
    known = {"with-factor": Release("somebody/saes", "sae_lens", "gpt2", "x", saes, scale={"one": 0.7})}
    monkeypatch.setattr(hub, "releases", lambda: known)
    shutil.copytree(FIXTURES / "sae_lens" / "standard_scaled", tmp_path / "hub" / "standard_scaled")
    (tmp_path / "hub" / "standard_scaled" / sae_lens.SCALER).unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, allow_patterns: str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("name", "sae_id"), [("with-factor", "one"), ("somebody/saes", "one"), ("somebody/saes", "standard_scaled")]
)
def test_the_factor_of_the_table_is_folded(table, name, sae_id):
    """P-63: also if the repository or the path is given instead of the release or the id."""
    expected = load_file(FIXTURES / "sae_lens/standard_scaled/expected.safetensors")
    assert_same(load_sae(name, sae_id=sae_id).encode(expected["x"]), expected["code"])


@pytest.mark.parametrize(
    ("name", "sae_id", "sentence"),
    [
        ("with-factor", "two", "has no SAE 'two': give sae_id=<one of 1>, such as one"),
        ("with-factor", None, "has no SAE None"),
        ("nothing", None, "is not a folder, a file or one of the 1 releases known here"),
        ("./nothing", None, "^there is no folder or file ./nothing: give the folder of a run or of an SAE"),
    ],
)
def test_what_the_hub_does_not_have_is_said(table, name, sae_id, sentence):
    with pytest.raises(UserError, match=sentence):
        load_sae(name, sae_id=sae_id)


def test_a_hub_out_of_reach_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded from the hub"):
        hub.download(hub.Entry("somebody/nothing", "x"))
