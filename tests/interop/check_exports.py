"""The folders of write_exports.py, loaded by the libraries themselves: codes and x_hat as ours, or an exit code of 1.

Runs in the environment of requirements.txt, where sae_lab is not installed. Names of formats after the folder choose
some of them: `check_exports.py /tmp/exports sae_lens` needs SAELens alone.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-6


def sae_lens(folder: Path):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return sae.encode, sae


def dictionary_learning(folder: Path):
    from dictionary_learning.utils import load_dictionary

    sae = load_dictionary(str(folder), "cpu")[0]
    return sae.encode, lambda x: sae.decode(sae.encode(x))


def sparsify(folder: Path):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)

    def encode(x: torch.Tensor) -> torch.Tensor:
        out = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter(1, out.top_indices, out.top_acts)

    return encode, lambda x: sae(x).sae_out


def circuit_tracer(folder: Path):
    """Rows of a layer are rows of its set; those of a cross-layer transcoder are (b, layers, d) here."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    file = folder / "layer_0.safetensors"
    if file.is_file():
        (sae,) = load_transcoder_set({0: str(file)}, "", "mlp.hook_in", "hook_mlp_out")
        return sae.encode, sae
    clts = [load_clt(str(folder), dtype=torch.float32, lazy_decoder=lazy) for lazy in (True, False)]

    def encode(x: torch.Tensor) -> torch.Tensor:
        return clts[0].encode(x.transpose(0, 1)).transpose(0, 1).flatten(1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        lazy, loaded = (clt(x.transpose(0, 1)).transpose(0, 1) for clt in clts)
        assert torch.equal(lazy, loaded)
        return loaded

    return encode, forward


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest |a - b| / |b| of a row: BOS' may be ten times as long as the others', and rounding goes with it.

    Of several sources each is a row of its own.
    """
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    return ((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)).max().item()


@torch.no_grad()
def main(root: Path, *formats: str) -> int:
    worst, n = 0.0, 0
    for load in (sae_lens, dictionary_learning, sparsify, circuit_tracer):
        if formats and load.__name__ not in formats:
            continue
        for file in sorted((root / load.__name__).glob("*/expected.safetensors")):
            encode, forward = load(file.parent)
            expected = load_file(file)
            for rows in ("random", "real"):
                x, code, x_hat = (expected[f"{rows}.{name}"] for name in ("x", "code", "x_hat"))
                theirs = encode(x)
                errors = error(theirs, code), error(forward(x), x_hat)
                l0 = (theirs > 0).sum() / (code > 0).sum()
                good = max(errors) < TOLERANCE and abs(l0 - 1) < 0.01
                worst, n = max(worst, *errors), n + 1
                name = f"{load.__name__}/{file.parent.name}"
                figures = f"code {errors[0]:.1e}  x_hat {errors[1]:.1e}  l0 {l0:.4f}"
                print(f"{'ok  ' if good else 'FAIL'} {name:45} {rows:7} {figures}")
                if not good:
                    return 1
    print(f"{n} comparisons agree, the worst to {worst:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
