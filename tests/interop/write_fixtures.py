"""Tiny SAEs (d 8, f 16) as other libraries write them, each with rows, codes and reconstructions of that library.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r tests/interop/requirements.txt
    /tmp/peers/bin/python tests/interop/write_fixtures.py

Runs where sae_lab is not installed. Every fixture is a folder <library>/<case>/ with the library's own files and
expected.safetensors: x (n, d), code (n, f), x_hat (n, d), which of a transcoder is what it predicts. OpenAI's code is
no package: that file and its figures follow the formulas of its model.py. Gemma Scope's figures are SAELens' for the
same weights.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

D, F_, K = 8, 16, 4
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "fixtures")
x = 2 * torch.randn(12, D, generator=torch.Generator().manual_seed(0)) + 0.5


@torch.no_grad()
def scramble(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Weights of every scale and sign: norms that are not one, biases and thresholds that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if name == "threshold":  # one of them below zero
            parameter.abs_()[0] = -0.5
    return module


@torch.no_grad()
def keep(folder: Path, encode, decode) -> None:
    code = encode(x)
    save_file({"x": x, "code": code.contiguous(), "x_hat": decode(code).contiguous()}, folder / "expected.safetensors")


def keep_transcoder(folder: Path, encode, forward) -> None:
    """What a skip connection adds is no part of the library's `decode`."""
    keep(folder, encode, lambda code: forward(x))


def sae_lens_cases() -> None:
    metadata = {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post", "prepend_bos": True, "context_size": 128}
    cases = {
        "standard": ("standard", {}),
        "standard_uncentred": ("standard", {"apply_b_dec_to_input": False}),
        "gated": ("gated", {}),
        "gated_uncentred": ("gated", {"apply_b_dec_to_input": False}),
        "jumprelu": ("jumprelu", {"apply_b_dec_to_input": False}),
        "jumprelu_layer_norm": ("jumprelu", {"normalize_activations": "layer_norm"}),
        "topk": ("topk", {"k": K}),
        "topk_rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
        "topk_constant_norm": ("topk", {"k": K, "normalize_activations": "constant_norm_rescale"}),
    }
    for name, (architecture, options) in cases.items():
        sae_class, config_class = get_sae_class(architecture)
        config = {"d_in": D, "d_sae": F_, "architecture": architecture, "metadata": metadata, **options}
        sae = scramble(sae_class(config_class.from_dict(config)))
        folder = FOLDER / "sae_lens" / name
        sae.save_model(folder)
        sae = SAE.load_from_disk(folder)
        keep(folder, sae.encode, sae.decode)


def sae_lens_scaled() -> None:
    """Trained on scaled inputs, the factor kept beside it."""
    sae_class, config_class = get_sae_class("standard")
    config = {"d_in": D, "d_sae": F_, "architecture": "standard", "normalize_activations": "expected_average_only_in"}
    sae = scramble(sae_class(config_class.from_dict(config)))
    folder = FOLDER / "sae_lens" / "standard_scaled"
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.7}))
    sae.fold_activation_norm_scaling_factor(0.7)
    keep(folder, sae.encode, sae.decode)


def sae_lens_transcoders() -> None:
    metadata = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    config = {"d_in": D, "d_out": D, "d_sae": F_, "apply_b_dec_to_input": False, "metadata": metadata}
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        sae_class, config_class = get_sae_class(name)
        sae = scramble(sae_class(config_class.from_dict(config | {"architecture": name})))
        folder = FOLDER / "sae_lens" / name
        sae.save_model(folder)
        sae = SAE.load_from_disk(folder)
        keep_transcoder(folder, sae.encode, sae)
    sae.cfg.normalize_activations = "expected_average_only_in"
    folder = FOLDER / "sae_lens" / "jumprelu_skip_transcoder_scaled"
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.7}))
    sae.fold_activation_norm_scaling_factor(0.7)
    keep_transcoder(folder, sae.encode, sae)


def sae_lens_training() -> None:
    """Batch-wise rules as a training run saves them, and as it exports them for inference."""
    widths = {"matryoshka_widths": [4, 8, F_]}
    classes = {
        "batchtopk": (BatchTopKTrainingSAE, {}),
        "matryoshka_batchtopk": (MatryoshkaBatchTopKTrainingSAE, widths),
    }
    for name, (sae_class, extra) in classes.items():
        for rescaled in (True, False):
            config_class = get_sae_training_class(name)[1]
            config = {"d_in": D, "d_sae": F_, "architecture": name, "k": K, "rescale_acts_by_decoder_norm": rescaled}
            sae = scramble(sae_class(config_class.from_dict(config | extra)))
            sae.topk_threshold.fill_(0.8)
            suffix = "" if rescaled else "_unscaled"
            training, inference = (FOLDER / "sae_lens" / f"{name}_{kind}{suffix}" for kind in ("training", "inference"))
            sae.save_model(training)
            sae.save_inference_model(inference)
            deployed = SAE.load_from_disk(inference)
            for folder in (training, inference):
                keep(folder, deployed.encode, deployed.decode)


def sae_lens_legacy() -> None:
    """Before version 6: other names, TopK as an activation function."""
    for name, legacy in {
        "legacy": {"normalize_activations": False},
        "legacy_topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    }.items():
        sae_class, config_class = get_sae_class("standard")
        sae = scramble(sae_class(config_class.from_dict({"d_in": D, "d_sae": F_, "architecture": "standard"})))
        folder = FOLDER / "sae_lens" / name
        sae.save_model(folder)
        config = {"d_in": D, "d_sae": F_, "dtype": "float32", "device": "cpu", "hook_point": "blocks.8.hook_resid_pre"}
        (folder / "cfg.json").write_text(json.dumps(config | legacy))
        weights = load_file(folder / "sae_weights.safetensors") | {"scaling_factor": torch.ones(F_)}
        save_file(weights, folder / "sae_weights.safetensors")
        sae = SAE.load_from_disk(folder)
        keep(folder, sae.encode, sae.decode)


def dictionary_learning_cases() -> None:
    cases = {
        "AutoEncoder": AutoEncoder(D, F_),
        "AutoEncoderNew": AutoEncoderNew(D, F_),
        "GatedAutoEncoder": GatedAutoEncoder(D, F_),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D, F_),
        "AutoEncoderTopK": AutoEncoderTopK(D, F_, K),
        "BatchTopKSAE": BatchTopKSAE(D, F_, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F_, K, [4, 4, 8]),
    }
    for name, sae in cases.items():
        scramble(sae)
        if "BatchTopK" in name:
            sae.threshold.fill_(0.8)
        folder = FOLDER / "dictionary_learning" / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({key: tensor.cpu() for key, tensor in sae.state_dict().items()}, folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F_} | ({"k": K} if "TopK" in name else {})
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}, indent=4))
        sae = load_dictionary(str(folder), "cpu")[0]
        keep(folder, sae.encode, sae.decode)


def sparsify_cases() -> None:
    cases = {
        "topk": {},
        "topk_free_norm": {"normalize_decoder": False, "num_latents": F_},
        "transcoder": {"transcode": True},
        "skip_transcoder": {"transcode": True, "skip_connection": True},
    }
    for name, options in cases.items():
        sae = scramble(SparseCoder(D, SparseCoderConfig(expansion_factor=F_ // D, k=K, **options)))
        folder = FOLDER / "sparsify" / name
        sae.save_to_disk(folder)
        sae = SparseCoder.load_from_disk(folder)

        def encode(rows: torch.Tensor, sae: SparseCoder = sae) -> torch.Tensor:
            out = sae.encode(rows)
            return torch.zeros(len(rows), F_).scatter(1, out.top_indices, out.top_acts)

        if sae.cfg.transcode:
            keep_transcoder(folder, encode, lambda rows, sae=sae: sae(rows).sae_out)
        else:
            keep(folder, encode, lambda code, sae=sae: sae.decode(code, torch.arange(F_).expand(len(code), F_)))


def gemma_scope_case() -> None:
    sae = SAE.load_from_disk(FOLDER / "sae_lens" / "jumprelu")
    folder = FOLDER / "gemma_scope" / "jumprelu"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: t.detach().numpy() for name, t in sae.state_dict().items()})
    keep(folder, sae.encode, sae.decode)


def openai_case() -> None:
    generator = torch.Generator().manual_seed(2)
    state = {"pre_bias": (D,), "encoder.weight": (F_, D), "latent_bias": (F_,), "decoder.weight": (D, F_)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in state.items()}
    folder = FOLDER / "openai" / "topk"
    folder.mkdir(parents=True, exist_ok=True)
    extra = {"stats_last_nonzero": torch.zeros(F_, dtype=torch.long), "activation": "TopK"}
    torch.save(state | extra | {"activation_state_dict": {"k": K, "postact_fn": "ReLU"}}, folder / "8.pt")
    mean, std = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        normed = (rows - mean) / (std + 1e-5)
        top = F.linear(normed - state["pre_bias"], state["encoder.weight"], state["latent_bias"]).topk(K, dim=-1)
        return torch.zeros(len(rows), F_).scatter(-1, top.indices, top.values.relu())

    keep(folder, encode, lambda code: (F.linear(code, state["decoder.weight"]) + state["pre_bias"]) * std + mean)


if __name__ == "__main__":
    sae_lens_cases()
    sae_lens_scaled()
    sae_lens_transcoders()
    sae_lens_training()
    sae_lens_legacy()
    dictionary_learning_cases()
    sparsify_cases()
    gemma_scope_case()
    openai_case()
