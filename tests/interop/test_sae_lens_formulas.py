"""SAELens' own formulas on the exported files alone, in float64, beside ours: reader and writer may share a mistake."""

import json
from pathlib import Path

import pytest
import torch
from conftest import planted
from safetensors.torch import load_file
from test_export import PLAIN, PROVENANCE, trained, transcoder
from torch import Tensor
from torch.nn.functional import relu

from sae_lab.interop import sae_lens
from sae_lab.runtime.errors import UserError
from sae_lab.saes.parts.normalize import NORMALIZERS

SOURCES = {"sae": trained, "transcoder": transcoder}


def exported(folder: Path, kind: str, *how: str):
    """An SAE and its export; skips what has no form in SAELens, which test_export.py looks at."""
    sae = SOURCES[kind](*how)
    try:
        sae_lens.write(sae, folder, PROVENANCE | {"sites": PROVENANCE["sites"] * sae.n_sources})
    except UserError as refusal:
        pytest.skip(str(refusal))
    return sae.double(), json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


def normalize(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """x as SAELens' encoder takes it, and what is multiplied by and added to the decoder's output."""
    if rule == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), std, mean
    if rule == "constant_norm_rescale":
        scale = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * scale, 1 / scale, torch.zeros(())
    assert rule == "none"
    return x, torch.ones(()), torch.zeros(())


def theirs(x: Tensor, cfg: dict, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(codes, output) by the formulas of SAELens 6.54.12."""
    t = {name: tensor.double() for name, tensor in t.items()}
    rows, scale, shift = normalize(x, cfg["normalize_activations"])
    h = (rows - t["b_dec"] * cfg["apply_b_dec_to_input"]) @ t["W_enc"]
    rule = cfg["architecture"].replace("_skip", "").replace("_transcoder", "").replace("transcoder", "standard")
    if rule == "gated":
        code = (h + t["b_gate"] > 0) * relu(h * t["r_mag"].exp() + t["b_mag"])
    elif rule == "topk":
        kept = (h := relu(h + t["b_enc"])).topk(cfg["k"], sorted=False)
        code = torch.zeros_like(h).scatter(-1, kept.indices, kept.values)
    elif rule == "jumprelu":
        code = relu(h + t["b_enc"]) * (h + t["b_enc"] > t["threshold"])
    else:
        code = relu(h + t["b_enc"])
    skip = x @ t["W_skip"].T if "W_skip" in t else 0
    return code, (code @ t["W_dec"] + t["b_dec"]) * scale + shift + skip


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)).max().item()


CASES = [
    *(("sae", name, rule) for name in PLAIN for rule in ("per_token", "mean_norm")),
    *(("sae", "jumprelu", rule) for rule in NORMALIZERS.keys() - {"per_token", "mean_norm"}),
    *(("transcoder", name, "mean_norm") for name in ("vanilla", "jumprelu", "batch_topk", "matryoshka")),
]


@pytest.mark.parametrize(("kind", "name", "rule"), sorted(CASES))
def test_the_files_alone_give_our_numbers(kind, name, rule, tmp_path):
    """Codes and x_hat in raw units to 1e-6 of the row's norm, with every normalization folded or named."""
    part = {"sae": "sae.encoder_bias=true", "transcoder": "sae.skip=true"}[kind]
    sae, cfg, tensors = exported(tmp_path, kind, name, f"sae.normalize={rule}", part)
    x = (3 * planted(60, seed=2)[0] + 1).double()
    code, out = theirs(x[:, 0], cfg, tensors)
    assert 0 < (code > 0).sum() < code.numel()
    assert relative_error(code, sae.encode(x)) < 1e-6
    assert relative_error(out, sae.predict(x)[:, 0]) < 1e-6


def test_the_config_has_what_the_benchmarks_read(tmp_path):
    """SAEBench and sae-probes load the model by name, hook it and tokenize by these entries (see bench/concepts)."""
    _, cfg, tensors = exported(tmp_path, "sae", "batch_topk")
    assert {file.name for file in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == ("jumprelu", 16, 64, "float32")
    read = {key: cfg["metadata"][key] for key in ("model_name", "hook_name", "context_size", "prepend_bos")}
    assert read == {
        "model_name": "gpt2",
        "hook_name": "blocks.7.hook_resid_post",
        "context_size": 128,
        "prepend_bos": True,
    }
    assert cfg["metadata"]["hook_head_index"] is None
    assert cfg["metadata"]["model_from_pretrained_kwargs"] == {}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "W_enc": ((16, 64), torch.float32),
        "W_dec": ((64, 16), torch.float32),
        "b_enc": ((64,), torch.float32),
        "b_dec": ((16,), torch.float32),
        "threshold": ((64,), torch.float32),
    }
