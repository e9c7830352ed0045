"""Exports by slices of the latents: the bytes of an export of the whole SAE, in less memory."""

import pytest
import torch
from conftest import build
from safetensors.torch import save

from sae_lab.interop import slices
from sae_lab.interop.safetensors_file import SafetensorsFile
from sae_lab.runs import export
from sae_lab.saes.files import save_sae


def test_a_file_written_piece_by_piece_has_the_bytes_of_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(6, 4),
        "a": torch.randn(3).to(torch.bfloat16),
        "steps": torch.arange(2),
        "c": torch.randn(2, 6, 3),
        "scalar": torch.tensor(1.5),
        "k": torch.tensor(3, dtype=torch.int32),
    }
    with (tmp_path / "x").open("wb") as f:
        file = SafetensorsFile(f, {name: (t.dtype, t.shape) for name, t in tensors.items()})
        for name in ("scalar", "a", "k", "steps"):
            file.put(name, tensors[name])
        for i in (3, 0):
            file.put("c", tensors["c"][:, i : i + 3], axis=1, start=i)
            file.put("b", tensors["b"][i : i + 3], start=i)
    assert (tmp_path / "x").read_bytes() == save(tensors)


@pytest.mark.parametrize(
    ("sae", "format", "settings"),
    [
        ("batch_topk", "sae_lens", ("sae.normalize=mean_norm",)),
        ("jumprelu", "sae_lens", ("sae.normalize=none",)),
        ("topk", "sparsify", ("sae.normalize=none",)),
    ],
)
def test_a_large_sae_is_exported_by_slices_with_the_same_bytes(tmp_path, monkeypatch, sae, format, settings):
    made = build(sae, *settings, n_latents=50)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.5 + torch.rand(tensor.shape)
    save_sae(made.eval(), tmp_path / "sae")
    export.export_sae(tmp_path / "sae", format, tmp_path / "whole")
    monkeypatch.setattr(export, "LARGE", 0)
    monkeypatch.setattr(slices, "SLICE", 2_000)
    load, read = slices.load_sae_folder, []
    monkeypatch.setattr(slices, "load_sae_folder", lambda f, **given: read.append(given["latents"]) or load(f, **given))
    export.export_sae(tmp_path / "sae", format, tmp_path / "slices")
    assert len(read) > 3
    whole, by_slices = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "slices"))
    assert whole == by_slices
