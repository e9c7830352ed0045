"""Compare our readers with SAELens' own loaders on the small files of published.py, for every release of its table.

Run in an environment with sae-lens (see requirements.txt), from the root:
PYTHONPATH=tests:tests/interop:. python tests/interop/check_releases.py
SAELens takes widths from its table or from names, so they are replaced by those of the small files.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import published
import torch
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes import sae as base
from safetensors.torch import load_file
from test_releases import READABLE, write

from sae_lab import load_sae
from sae_lab.interop.releases import releases

ROOT = Path(tempfile.mkdtemp())
NORMS = {"llama_scope": 6.3125, "llama_scope_r1": 3.5}
WANDB = {"d_model": {"value": published.D}, "d_feature": {"value": published.F}, "batch_size": {"value": 1}}
HOOKS = {"model_name": "x", "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def find(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
    file = ROOT / repo_id / (subfolder or "") / filename
    if not file.exists():
        raise EntryNotFoundError(str(file))
    return str(file)


def with_small_sizes(getter: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def small(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = dict(getter(*args, **kwargs)) | {"d_in": published.D, "d_sae": published.F, "dtype": "float32"}
        return config | ({"d_out": published.D} if "d_out" in config else {})

    return small


def patch() -> None:
    loaders.hf_hub_download = find
    loaders.get_safetensors_tensor_shapes = lambda repo, name: {
        key: list(tensor.shape) for key, tensor in load_file(ROOT / repo / name).items()
    }
    for name in dir(loaders):
        if name.startswith("get_") and name.endswith("_config_from_hf") and "sae_lens" not in name:
            setattr(loaders, name, with_small_sizes(getattr(loaders, name)))
    factor = base.get_norm_scaling_factor

    def small_factor(release: str, sae_id: str) -> float | None:
        norm = NORMS.get(releases()[release].format)
        return factor(release, sae_id) if norm is None else math.sqrt(published.D) / norm

    base.get_norm_scaling_factor = small_factor
    huggingface_hub.snapshot_download = lambda repo, allow_patterns: str(ROOT / repo)


@torch.no_grad()
def differences(name: str) -> tuple[float, float, int]:
    """Return the largest differences in codes and x_hat, and how many entries are active in one of them only."""
    release = releases()[name]
    published.F = 128 if release.format == "qwen_scope" else 24
    sae_id, path = list(release.paths().items())[-1]
    published.describe(ROOT / release.repo / "wandb-config.yaml", WANDB)
    published.describe(ROOT / release.repo / "config.yaml", HOOKS)
    write(release, sae_id, ROOT / release.repo / path)
    theirs, ours = SAE.from_pretrained(name, sae_id), load_sae(name, sae_id=sae_id)
    x = published.numbers(200, published.D, seed=9)
    given = x.view(200, 2, -1) if theirs.cfg.reshape_activations == "hook_z" else x
    code, x_hat = theirs.encode(given), theirs(given).reshape(x.shape)
    found = ours.encode(x)
    found = found if isinstance(found, torch.Tensor) else found.to_dense()
    there = ours.predict(x)[:, 0] if ours.n_inputs else ours.reconstruct(x)
    shutil.rmtree(ROOT / release.repo)
    active = int(((code > 0) != (found > 0)).sum())
    return float((code - found).abs().max()), float((x_hat - there).abs().max()), active


if __name__ == "__main__":
    patch()
    by_format: dict[str, list[tuple[float, float, int]]] = {}
    for name in READABLE:
        by_format.setdefault(releases()[name].format, []).append(differences(name))
    for format, found in by_format.items():
        codes, x_hats, active = zip(*found, strict=True)
        print(
            f"{format:20} {len(found):3} releases  code {max(codes):.1e}  x_hat {max(x_hats):.1e}  active {sum(active)}"
        )
