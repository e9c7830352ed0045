"""Trained SAEs of every architecture in every format that has a form for them, for check_exports.py to load.

    python tests/interop/write_exports.py /tmp/exports
    /tmp/peers/bin/python tests/interop/check_exports.py /tmp/exports

Each SAE sees 100 batches of the bundled model's activations, each transcoder those before and after an MLP, each
cross-layer transcoder those of all six. A folder <format>/<sae>-<normalize>[-transcoder|-skip|-cross_layer]/ holds the
export and expected.safetensors: for random and for real activations x, what our SAE makes of them.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SAE_NAMES, build, compose

from sae_lab.runs.export import WRITERS
from sae_lab.runs.provenance import provenance
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.parts.normalize import NORMALIZERS

NAMES = [name for name in SAE_NAMES if hasattr(build(name), "W_enc") and not build(name).signed]


def train(sae: BaseSAE, batches: list[torch.Tensor]) -> BaseSAE:
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for x in batches:
        loss = torch.stack(list(sae.losses(sae(x)).values())).sum()
        adam.zero_grad()
        loss.backward()
        sae.before_step()
        adam.step()
        sae.after_step()
    return sae.eval()


@torch.no_grad()
def expected(sae: BaseSAE, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the SAE makes of rows. In float64 if it whitens: in float32 that alone costs up to 2e-6 of a row's norm."""
    dtype = torch.float64 if sae.config["normalize"] == "whiten" else torch.float32
    sae = deepcopy(sae).to(dtype)
    random = torch.randn(200, *real.shape[1:], generator=torch.Generator().manual_seed(0))
    rows = {"random": random * real.std(dim=(0, 2), keepdim=True), "real": real}
    out = {}
    for name, x in rows.items():
        code, x_hat = sae.encode(x.to(dtype)), sae.predict(x.to(dtype))
        out |= {f"{name}.x": x.squeeze(1), f"{name}.code": code, f"{name}.x_hat": x_hat.squeeze(1)}
    return {name: t.float().clone() for name, t in out.items()}


def write_all(
    out: Path, kinds: dict[str, tuple[str, ...]], n_sources: int, *overrides: str, names: Sequence[str] = NAMES
) -> None:
    """Every SAE, under every normalisation, in each of the kinds, which are settings, in every format."""
    cfg = compose("data.block_tokens=102_400", "n_tokens=102_400", "lm.device=cpu", *overrides)
    data = instantiate(cfg.data, lm=instantiate(cfg.lm))
    stream = data.new_stream()
    batches = [next(stream) for _ in range(100)]
    said = provenance(
        OmegaConf.to_container(compose("hydra.job.chdir=false", *overrides), resolve=False), data.origin()
    )
    said["data"] = OmegaConf.to_container(cfg.data, resolve=True)
    for name, normalize, (kind, settings) in product(names, NORMALIZERS, kinds.items()):
        if n_sources > 1 and NORMALIZERS[normalize].by_row:
            continue  # no transcoder takes the scale of what it predicts from the row
        settings = ("k=16", f"sae.normalize={normalize}", *settings)
        sae = train(build(name, *settings, d_in=128, n_latents=576, n_sources=n_sources), batches)
        for format, write in WRITERS.items():
            folder = out / format / f"{name}-{normalize}{kind}"
            try:
                write(sae, folder, said)
            except UserError as e:
                print(f"{format}/{folder.name}: {e}")
                continue
            real = data.probe_rows(128)[:, : sae.n_inputs or 1]
            save_file(expected(sae, real), folder / "expected.safetensors")


if __name__ == "__main__":
    transcoder = ("sae.n_inputs=1", "sae.encoder_bias=true")
    write_all(Path(sys.argv[1]), {"": ()}, 1)
    kinds = {"-transcoder": transcoder, "-skip": (*transcoder, "sae.skip=true")}
    write_all(Path(sys.argv[1]), kinds, 2, "lm.sites=[blocks.0.mlp.hook_in,blocks.0.hook_mlp_out]")
    every = ",".join([f"blocks.{i}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for i in range(6)])
    for name, rule in {"batch_topk": "BatchTopK", "jumprelu": "JumpReLU"}.items():
        target = f"sae._target_=sae_lab.saes.cross_layer.CrossLayer{rule}SAE"
        kinds = {"-cross_layer": (target, "sae.encoder_bias=true")}
        write_all(Path(sys.argv[1]), kinds, 12, f"lm.sites=[{every}]", names=[name])
