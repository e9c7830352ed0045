"""circuit-tracer's files: what its formulas make of them is what ours make; what it cannot load is not written."""

import json
import logging

import pytest
import torch
import yaml
from conftest import build, planted
from safetensors.torch import load_file, save_file
from test_export import PROVENANCE, transcoder

from sae_lab import load_sae
from sae_lab.interop import circuit_tracer
from sae_lab.runs.export import export_sae
from sae_lab.runtime.errors import UserError
from sae_lab.saes.cross_layer import CrossLayerTopKSAE
from sae_lab.saes.files import save_sae

PART, LAYERS = 16, 3
CLASSES = {"batch_topk": "CrossLayerBatchTopKSAE", "jumprelu": "CrossLayerJumpReLUSAE"}
UNITS = torch.tensor([10.0, 1, 5, 0.1, 2, 0.5]).view(-1, 1)
"""Of each source: what the layers read, and what they write."""


def sites(*layers: int) -> list[str]:
    return [f"blocks.{i}.mlp.hook_in" for i in layers] + [f"blocks.{i}.hook_mlp_out" for i in layers]


def said(*layers: int) -> dict:
    return PROVENANCE | {"sites": sites(*layers)}


def cross_layer(name: str, normalize: str = "mean_norm"):
    target = f"sae._target_=sae_lab.saes.cross_layer.{CLASSES[name]}"
    settings = (target, "sae.encoder_bias=true", f"sae.normalize={normalize}")
    sae = build(name, *settings, n_latents=PART * LAYERS, n_sources=2 * LAYERS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key not in ("W_enc", "W_dec"):
                parameter.copy_(0.2 * torch.rand(parameter.shape, generator=generator))
    sae(rows())
    return sae.eval()


def rows(seed: int = 0) -> torch.Tensor:
    return planted(64, n_sources=2 * LAYERS, seed=seed)[0] * UNITS


def traced(folder, x):
    """CrossLayerTranscoder.encode and .decode of circuit-tracer 0.5.0 in plain torch: (code, y_hat)."""
    n = len(list(folder.glob("W_enc_*.safetensors")))
    codes, y_hat = [], torch.zeros_like(x[:, :n])
    for i in range(n):
        enc, dec = (load_file(folder / f"W_{kind}_{i}.safetensors") for kind in ("enc", "dec"))
        h = x[:, i] @ enc[f"W_enc_{i}"].T + enc[f"b_enc_{i}"]
        codes.append(h * (h > enc[f"threshold_{i}"]))
        y_hat[:, i] += enc[f"b_dec_{i}"]
        y_hat[:, i:] += torch.einsum("bf,fld->bld", codes[i], dec[f"W_dec_{i}"])
    return torch.cat(codes, dim=1), y_hat


@pytest.mark.parametrize("normalize", ["none", "mean_norm", "centred", "whiten"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_cross_layer_transcoder_computes_the_same_there_and_back(name, normalize, tmp_path):
    sae, x = cross_layer(name, normalize), rows(seed=1)
    circuit_tracer.write(sae, tmp_path, said(0, 1, 2))
    code, y_hat = traced(tmp_path, x)
    assert 0 < (code > 0).sum() < 0.9 * code.numel()
    torch.testing.assert_close(code, sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y_hat, sae.predict(x), rtol=1e-5, atol=1e-5)
    back = load_sae(tmp_path)
    assert type(back).__name__ == "CrossLayerJumpReLUSAE"
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.predict(x[:, :LAYERS]), sae.predict(x), rtol=1e-5, atol=1e-5)


def test_each_layer_has_its_tensors_and_its_scales(tmp_path):
    """A latent's W_enc is divided by the scale of the layer it reads, its W_dec multiplied by those it writes."""
    sae = cross_layer("batch_topk")
    read, written = sae.sources.normalizer.scale.flatten(), sae.sources.target_normalizer.scale.flatten()
    assert read[0] > 8 * read[1] > 0
    assert written[1] > 8 * written[0] > 0
    circuit_tracer.write(sae, tmp_path, said(0, 1, 2))
    for i in range(LAYERS):
        own = slice(PART * i, PART * (i + 1))
        enc, dec = (load_file(tmp_path / f"W_{kind}_{i}.safetensors") for kind in ("enc", "dec"))
        assert list(dec) == [f"W_dec_{i}"]
        torch.testing.assert_close(dec[f"W_dec_{i}"], sae.W_dec[own, i:].detach() * written[i:, None])
        due = {
            f"W_enc_{i}": sae.W_enc[own, 0].detach() / read[i],
            f"b_enc_{i}": sae.b_enc[own].detach(),
            f"b_dec_{i}": sae.b_dec[i].detach() * written[i],
            f"threshold_{i}": sae.threshold.expand(PART),
        }
        torch.testing.assert_close(enc, due)
        assert dec[f"W_dec_{i}"].shape == (PART, LAYERS - i, 16)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "model_name": "gpt2",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }


def test_files_without_thresholds_are_relus(tmp_path):
    """What circuit-tracer writes where it has F.relu; a model of one layer is one as well."""
    generator = torch.Generator().manual_seed(0)
    enc = {"W_enc_0": (8, 4), "b_enc_0": (8,), "b_dec_0": (4,)}
    enc = {name: torch.randn(shape, generator=generator) for name, shape in enc.items()}
    W_dec, x = torch.randn(8, 1, 4, generator=generator), torch.randn(20, 4, generator=generator)
    save_file(enc, tmp_path / "W_enc_0.safetensors")
    save_file({"W_dec_0": W_dec}, tmp_path / "W_dec_0.safetensors")
    code = (x @ enc["W_enc_0"].T + enc["b_enc_0"]).relu()
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.encode(x), code)
    torch.testing.assert_close(sae.predict(x)[:, 0], code @ W_dec[:, 0] + enc["b_dec_0"])
    circuit_tracer.write(sae, tmp_path / "out", said(0))
    torch.testing.assert_close(traced(tmp_path / "out", x.unsqueeze(1))[0], code)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda enc, dec: enc.pop("b_enc_1"), "no tensor 'b_enc_1'"),
        (lambda enc, dec: enc.update(W_enc_1=torch.ones(8, 16)), r"'W_enc_1' .* shape \(8, 16\), expected \(16, 16\)"),
        (lambda enc, dec: enc.update(W_skip_1=torch.ones(16, 16)), "unknown meaning, W_skip_1"),
        (lambda enc, dec: dec.update(W_dec_1=torch.ones(16, 3, 16)), r"\(16, 3, 16\), expected \(16, 2, 16\)"),
        (lambda enc, dec: enc.pop("threshold_1"), "holds an invalid value"),
    ],
)
def test_broken_files_are_refused(change, sentence, tmp_path):
    circuit_tracer.write(cross_layer("jumprelu"), tmp_path, said(0, 1, 2))
    files = [tmp_path / f"W_{kind}_1.safetensors" for kind in ("enc", "dec")]
    tensors = [load_file(file) for file in files]
    change(*tensors)
    for file, changed in zip(files, tensors, strict=True):
        save_file(changed, file)
    with pytest.raises(UserError, match=sentence):
        load_sae(tmp_path)


@pytest.mark.parametrize("skip", ["true", "false"])
@pytest.mark.parametrize("normalize", ["none", "mean_norm"])
@pytest.mark.parametrize("name", ["vanilla", "jumprelu", "batch_topk", "matryoshka"])
def test_a_layers_transcoder_computes_the_same_there_and_back(name, normalize, skip, tmp_path):
    """SingleLayerTranscoder.encode and .decode of circuit-tracer 0.5.0 in plain torch, on what the file holds."""
    sae, x = transcoder(name, f"sae.normalize={normalize}", f"sae.skip={skip}"), 3 * planted(50, seed=1)[0] + 1
    assert circuit_tracer.write(sae, tmp_path, said(5)) == "layer_5.safetensors"
    t = load_file(tmp_path / "layer_5.safetensors")
    h = x[:, 0] @ t["W_enc"].T + t["b_enc"]
    code = h.relu() if name == "vanilla" else h * (h > t["activation_function.threshold"])
    y_hat = code @ t["W_dec"] + t["b_dec"] + (x[:, 0] @ t["W_skip"].T if skip == "true" else 0)
    torch.testing.assert_close(code, sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y_hat, sae.predict(x)[:, 0], rtol=1e-5, atol=1e-5)
    assert ("W_skip" in t, "activation_function.threshold" in t) == (skip == "true", name != "vanilla")
    for back in (load_sae(tmp_path / "layer_5.safetensors"), load_sae(tmp_path, sae_id="layer_5.safetensors")):
        torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back.predict(x), sae.predict(x), rtol=1e-5, atol=1e-5)


def test_layers_come_together_run_by_run(tmp_path, caplog):
    """One description fits them all: circuit-tracer looks for the layers' files itself."""
    caplog.set_level(logging.INFO)
    for layer in (0, 2, 1):
        sae = transcoder(("vanilla", "jumprelu", "batch_topk")[layer], "sae.normalize=mean_norm")
        save_sae(sae, tmp_path / "run" / "sae", said(layer))
        export_sae(tmp_path / "run", "circuit_tracer", tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert f'load_sae("<this folder or repository>", sae_id="layer_{layer}.safetensors")\n' in card
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model_kind"] == "transcoder_set"
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        f"layer_{i}.safetensors" for i in range(3)
    ]
    assert "holds layers 0, 2: circuit-tracer needs every layer of gpt2" in caplog.text
    assert "holds layers 0, 1, 2: " in caplog.text


NONE = "sae.normalize=none"


@pytest.mark.parametrize(
    ("sae", "provenance", "sentence"),
    [
        (build("batch_topk", NONE), said(0), "cannot represent an SAE, only transcoders"),
        (transcoder("topk", NONE), said(0), "circuit-tracer .* class TopKSAE: use format=sparsify"),
        (transcoder("gated", NONE), said(0), "circuit-tracer .* class GatedSAE: no format can"),
        (transcoder("vanilla", NONE, n_sources=3), said(0, 1), "circuit-tracer .* from 1 to 2 sites"),
        (
            CrossLayerTopKSAE(k=4, d_in=16, n_latents=48, n_sources=6, normalize="none"),
            said(0, 1, 2),
            "class CrossLayerTopKSAE: no format can",
        ),
        (build("vanilla", "sae.n_inputs=1", "sae.normalize=mean_norm", n_sources=2), said(0), "no scale before"),
        (
            transcoder("vanilla", NONE),
            PROVENANCE,
            "one layer .* not lm.sites=.transformer.h.7.: train with lm.sites=.blocks.<lay",
        ),
        (transcoder("vanilla", NONE), {}, "one layer of the model, not lm.sites=.unknown.: train with"),
        (
            transcoder("vanilla", NONE),
            PROVENANCE | {"sites": [sites(3)[0], sites(4)[1]]},
            "not lm.sites=.blocks.3.mlp.hook_in, ",
        ),
        (
            transcoder("vanilla", NONE),
            said(0) | {"model": {"name": "gpt2", "processing": "layer norms folded"}},
            "runs the unprocessed model, .* processed one .layer norms folded.: train with lm.compatibility_mode=false",
        ),
        (
            cross_layer("jumprelu"),
            said(1, 2, 3),
            "all layers of the model from 0 on, not lm.sites=.blocks.1.mlp.hook_in, ",
        ),
        (cross_layer("jumprelu"), said(0, 2, 1), "all layers"),
        (cross_layer("jumprelu"), said(0, 1), "all layers"),
        (cross_layer("jumprelu"), PROVENANCE | {"sites": sites(0, 1, 2)[::-1]}, "all layers"),
        (
            cross_layer("jumprelu"),
            PROVENANCE | {"sites": ["blocks.0.hook_resid_pre", *sites(0, 1, 2)[1:]]},
            r"not lm.sites=.blocks.0.hook_resid_pre, .*lm.sites=\[blocks.0.mlp.hook_in,...,blocks.0.hook_mlp_out,...\]",
        ),
        (cross_layer("jumprelu"), PROVENANCE | {"sites": [*sites(0, 1, 2)[:5], "model.layers.2.mlp"]}, "all layers"),
    ],
)
def test_what_has_no_form_there_is_refused(sae, provenance, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        circuit_tracer.write(sae.eval(), tmp_path, provenance)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sae", "provenance", "sentence"),
    [
        (
            transcoder("vanilla", NONE),
            said(1) | {"model": {"name": "gpt3"}},
            "config.yaml describes transcoders of another",
        ),
        (transcoder("vanilla", NONE), PROVENANCE | {"sites": ["blocks.1.ln2.hook_normalized", sites(1)[1]]}, "another"),
        (cross_layer("jumprelu"), said(0, 1, 2), "another type, model or hook: export with out=<another folder>"),
        (
            transcoder("vanilla", NONE, "sae.skip=true"),
            said(1),
            "layer_0.safetensors cannot be in one folder with .* all or none",
        ),
    ],
)
def test_a_folder_of_other_transcoders_stays_as_it_is(sae, provenance, sentence, tmp_path):
    circuit_tracer.write(transcoder("batch_topk", NONE), tmp_path, said(0))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=sentence):
        circuit_tracer.write(sae, tmp_path, provenance)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_deeper_transcoders_files_are_counted_in(tmp_path):
    """circuit-tracer takes as many layers as there are files; an export that is repeated replaces its own."""
    for _ in range(2):
        circuit_tracer.write(cross_layer("jumprelu"), tmp_path, said(0, 1, 2))
    save_file({"x": torch.ones(1)}, tmp_path / "W_enc_3.safetensors")
    with pytest.raises(
        UserError, match=r"W_enc_3.safetensors cannot be in one folder with .* no other files: export with out=<another"
    ):
        circuit_tracer.write(cross_layer("jumprelu"), tmp_path, said(0, 1, 2))


def test_an_export_of_all_layers_loads_by_its_folder(tmp_path):
    sae, x = cross_layer("batch_topk"), rows(seed=1)
    save_sae(sae, tmp_path / "run" / "sae", said(0, 1, 2))
    export_sae(tmp_path / "run", "circuit_tracer", tmp_path / "out")
    assert 'load_sae("<this folder or repository>")\n' in (tmp_path / "out" / "README.md").read_text()
    torch.testing.assert_close(load_sae(tmp_path / "out").predict(x), sae.predict(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["sae_lens", "sparsify", "dictionary_learning"])
def test_other_formats_name_the_one_that_has_a_form(format, tmp_path):
    save_sae(cross_layer("jumprelu"), tmp_path / "run" / "sae", said(0, 1, 2))
    with pytest.raises(UserError, match="class CrossLayerJumpReLUSAE: use format=circuit_tracer"):
        export_sae(tmp_path / "run", format, tmp_path / "out")


def test_a_layer_of_the_hub_is_fetched_alone(tmp_path, monkeypatch):
    asked = []
    circuit_tracer.write(transcoder("vanilla", NONE), tmp_path, said(0))

    def download(repo, allow_patterns):
        asked.append((repo, json.dumps(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_sae("me/transcoders", sae_id="layer_0.safetensors").n_latents == 64
    assert asked == [("me/transcoders", '["layer_0.safetensors", "layer_0.safetensors/*"]')]
