"""Small files in the formats of published SAEs, with the names, dtypes and configs of the real ones.

Each writer puts one SAE of 8 dimensions and 24 latents below a folder and returns its library's formula: a function of
x (float64) that returns the code and x_hat, computed from the numbers that the file holds.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D, F, S = 8, 24, 3
Formula = Callable[[Tensor], tuple[Tensor, Tensor]]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def weights(dtype: torch.dtype = torch.float32, n_dec: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """W_enc (D, F), W_dec (F, ..., D), b_enc, b_dec and thresholds, some of them below 0."""
    parts = {"W_enc": numbers(D, F, seed=1, dtype=dtype), "W_dec": numbers(F, *n_dec, D, seed=2, dtype=dtype)}
    parts |= {"b_enc": numbers(F, seed=3, dtype=dtype), "b_dec": numbers(D, seed=4, dtype=dtype)}
    return parts | {"threshold": numbers(F, seed=5, dtype=dtype)}


def exact(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in parts.items()}


def jump(h: Tensor, threshold: Tensor | float) -> Tensor:
    return h.relu() * (h > threshold)


def linear(parts: dict[str, Tensor], activate: Callable[[Tensor], Tensor], centred: bool = False) -> Formula:
    p = exact(parts)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        code = activate((x - p["b_dec"] if centred else x) @ p["W_enc"] + p["b_enc"])
        return code, code @ p["W_dec"] + p["b_dec"] + (x @ p["skip"] if "skip" in p else 0)

    return formula


def store(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors as the suffix of the file says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    elif file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, file)


def describe(file: Path, config: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config) if file.suffix == ".yaml" else json.dumps(config))


def gemma_scope(path: Path) -> Formula:
    p = weights()
    store(path / "params.npz", p)
    return linear(p, lambda h: jump(h, exact(p)["threshold"]))


def gemma_scope_2(path: Path) -> Formula:
    p = weights()
    tensors = {"w_enc": p["W_enc"], "w_dec": p["W_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    tensors["threshold"] = p["threshold"]
    kind, skip = "transcoder" if "transcoder" in str(path) else "sae", str(path).endswith("_affine")
    if skip:
        tensors["affine_skip_connection"] = p["skip"] = numbers(D, D, seed=6)
    store(path / "params.safetensors", tensors)
    config = {"width": F, "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "l0": 150}
    describe(path / "config.json", config | {"affine_connection": skip, "type": kind})
    return linear(p, lambda h: jump(h, exact(p)["threshold"]))


def gemma_scope_2_layers(path: Path, kind: str) -> Formula:
    """A crosscoder or cross-layer transcoder of S layers: latents of layer i write to the layers from i on."""
    parts = []
    for i in range(S):
        p = {"w_enc": numbers(D, F, seed=10 + i), "w_dec": numbers(F, S, D, seed=20 + i), "b_enc": numbers(F, seed=i)}
        p["w_dec"][:, :i] = 0
        p |= {"b_dec": numbers(D, seed=30 + i), "threshold": numbers(F, seed=40 + i)}
        store(path / f"params_layer_{i}.safetensors", p)
        parts.append(exact(p))
    config = {"width": S * F, "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "l0": 150}
    describe(path / "config.json", config | {"affine_connection": False, "type": kind})
    stacked = {name: torch.stack([p[name] for p in parts]) for name in parts[0]}

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.einsum("bld,ldf->blf", x, stacked["w_enc"]) + stacked["b_enc"]
        code = jump(h, stacked["threshold"])
        return code.flatten(1), torch.einsum("blf,lfmd->bmd", code, stacked["w_dec"]) + stacked["b_dec"]

    return formula


def llama_scope(path: Path) -> Formula:
    p = weights(torch.bfloat16)
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
    tensors |= {"decoder.weight": p["W_dec"].T, "decoder.bias": p["b_dec"]}
    store(path / "checkpoints" / "final.safetensors", tensors)
    config = {"hook_point_in": "blocks.15.hook_mlp_out", "hook_point_out": "blocks.15.hook_mlp_out", "d_model": D,
              "d_sae": F, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "act_fn": "jumprelu",
              "jump_relu_threshold": 0.25, "norm_activation": "dataset-wise", "use_glu_encoder": False, "top_k": 50,
              "dataset_average_activation_norm": {"in": 6.3125, "out": 6.3125}, "dtype": "torch.bfloat16"}  # fmt: skip
    describe(path / "hyperparams.json", config)
    s = math.sqrt(D) / 6.3125
    inner = linear(p, lambda h: jump(h, s * 0.25))
    return lambda x: (inner(s * x)[0], inner(s * x)[1] / s)


def llama_scope_r1(path: Path) -> Formula:
    p = weights()
    hook = "blocks.15.hook_resid_post"
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "log_jumprelu_threshold": p["threshold"]}
    tensors |= {"decoder.weight": p["W_dec"].T, "decoder.bias": p["b_dec"]}
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(3.5)
    store(path / "sae_weights.safetensors", tensors)
    config = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F // D,
        "act_fn": "jumprelu",
        "use_decoder_bias": True,
    }
    describe(
        path / "config.json",
        config | {"norm_activation": "dataset-wise", "hook_point_in": hook, "hook_point_out": hook},
    )
    s = math.sqrt(D) / 3.5
    inner = linear(p, lambda h: jump(h, exact(p)["threshold"].exp()))
    return lambda x: (inner(s * x)[0], inner(s * x)[1] / s)


def top_k(k: int) -> Callable[[Tensor], Tensor]:
    def activate(h: Tensor) -> Tensor:
        kept = h.relu().topk(k)
        return torch.zeros_like(h).scatter(-1, kept.indices, kept.values)

    return activate


def qwen_scope(path: Path, k: int) -> Formula:
    p = weights()
    store(
        path, {"W_enc": p["W_enc"].T.clone(), "W_dec": p["W_dec"].T.clone(), "b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    )
    return linear(p, top_k(k))


def linear_layers(path: Path, end: str = "_linear") -> Formula:
    p = weights(torch.bfloat16)
    store(path, {f"encoder{end}.weight": p["W_enc"].T.clone(), f"encoder{end}.bias": p["b_enc"],
                 f"decoder{end}.weight": p["W_dec"].T.clone(), f"decoder{end}.bias": p["b_dec"]})  # fmt: skip
    return linear(p, torch.relu)


def matrices(path: Path) -> Formula:
    p = weights()
    store(path, {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    config = {"act_size": D, "dict_size": F, "act_name": "blocks.0.attn.hook_z"}
    describe(path.parent / f"{path.name.removesuffix('.pt')}_cfg.json", config)
    return linear(p, torch.relu, centred=True)


def circuit_tracer_layer(path: Path) -> Formula:
    p = weights(torch.bfloat16)
    store(path, {"W_enc": p["W_enc"].T, "W_dec": p["W_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]})
    return linear(p, torch.relu)


def circuit_tracer_sum(path: Path) -> Formula:
    """One encoder of a cross-layer transcoder; x_hat is the sum over the layers that it writes."""
    i = int(path.stem.split("_")[-1])
    p = weights(torch.bfloat16, n_dec=(2,))
    store(path, {f"W_enc_{i}": p["W_enc"].T, f"b_enc_{i}": p["b_enc"], f"b_dec_{i}": p["b_dec"]})
    store(path.parent / f"W_dec_{i}.safetensors", {f"W_dec_{i}": p["W_dec"]})
    return linear(p | {"W_dec": p["W_dec"].double().sum(1)}, torch.relu)


def sae_lens(path: Path, normalize: str = "none", scale: float = 1.0) -> Formula:
    p = weights()
    store(path / "sae_weights.safetensors", {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    config = {"d_in": D, "d_sae": F, "hook_point": "blocks.8.hook_resid_pre", "dtype": "torch.float32"}
    config |= {
        "model_name": "gpt2-small",
        "normalize_activations": "none" if scale == 1 else "expected_average_only_in",
    }
    describe(path / "cfg.json", config)
    inner = linear(p, torch.relu, centred=True)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        s = scale if normalize == "none" else math.sqrt(D) / x.norm(dim=-1, keepdim=True)
        code, x_hat = inner(s * x)
        return code, x_hat / s

    return formula


def dictionary_learning(path: Path) -> Formula:
    p = weights()
    tensors = {"encoder.weight": p["W_enc"].T.clone(), "encoder.bias": p["b_enc"], "b_dec": p["b_dec"]}
    tensors |= {"decoder.weight": p["W_dec"].T.clone(), "k": torch.tensor(4), "threshold": torch.tensor(0.3)}
    store(path / "ae.pt", tensors)
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F, "k": 4, "layer": 3,
               "lm_name": "meta-llama/Llama-3.1-8B-Instruct", "submodule_name": "resid_post_layer_3"}  # fmt: skip
    describe(path / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    return linear(p, lambda h: jump(h, torch.tensor(0.3).double()), centred=True)


def crosscoder(path: Path, kind: str) -> Formula:
    """A CrossCoder (kind="") or BatchTopKCrossCoder of two models, as its authors push it to the hub."""
    p = {"encoder.weight": numbers(2, D, F, seed=1), "encoder.bias": numbers(F, seed=3)}
    p |= {"decoder.weight": numbers(2, F, D, seed=2), "decoder.bias": numbers(2, D, seed=4)}
    extra = {"k": torch.tensor(4), "threshold": torch.tensor(2.0)}
    extra["code_normalization_id"] = torch.tensor({"CROSSCODER": 1, "SAE": 2, "NONE": 4}.get(kind, 0))
    store(path / "model.safetensors", p | (extra if kind else {}))
    describe(path / "config.json", {"activation_dim": D, "dict_size": F, "num_layers": 2})
    q = exact(p)
    W = q["decoder.weight"]
    norms = {"CROSSCODER": W.norm(dim=2).sum(0), "SAE": W.movedim(0, 1).flatten(1).norm(dim=1), "NONE": torch.ones(F)}

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        h = (torch.einsum("bld,ldf->bf", x, q["encoder.weight"]) + q["encoder.bias"]).relu()
        code = h * (h * norms[kind] > 2.0) if kind else h
        return code, torch.einsum("bf,lfd->bld", code, W) + q["decoder.bias"]

    return formula


def model_diff(path: Path) -> Formula:
    """A crosscoder of two models as Kissane et al. published it: four matrices in cc_weights.pt."""
    p = {"W_enc": numbers(2, D, F, seed=1, dtype=torch.bfloat16), "W_dec": numbers(F, 2, D, seed=2)}
    p |= {"b_enc": numbers(F, seed=3), "b_dec": numbers(2, D, seed=4)}
    store(path, p)
    q = exact(p)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        code = (torch.einsum("bld,ldf->bf", x, q["W_enc"]) + q["b_enc"]).relu()
        return code, torch.einsum("bf,fld->bld", code, q["W_dec"]) + q["b_dec"]

    return formula


def batch_topk(path: Path, kind: str) -> Formula:
    p = weights()
    tensors = {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if kind == "jumprelu":
        tensors["jumprelu.log_threshold"] = p["threshold"]
    store(path / "sae.pt", tensors)
    config = {
        "sae_type": kind,
        "act_size": D,
        "dict_size": F,
        "top_k": 4,
        "input_unit_norm": True,
        "dtype": "torch.float32",
    }
    describe(path / "config.json", config)
    activate = {"vanilla": torch.relu, "topk": top_k(4), "jumprelu": lambda h: jump(h, exact(p)["threshold"].exp())}
    inner = linear(p, activate[kind], centred=True)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        code, x_hat = inner((x - mean) / (std + 1e-5))
        return code, x_hat * std + mean

    return formula
