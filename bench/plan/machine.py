"""Measure this machine for conf/machine: `python bench/plan/machine.py` prints its rates as YAML in five minutes."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = [
    ("batch_topk", 128, 1_024, 16, 1024),
    ("batch_topk", 128, 16_384, 16, 1024),
    ("batch_topk", 128, 131_072, 16, 1024),
    ("batch_topk", 768, 12_288, 32, 4096),
    ("vanilla", 128, 1_024, 16, 1024),
    ("vanilla", 768, 6_144, 32, 1024),
]
"""SAE, d, f, k and batch."""


def figures(module: str, *overrides: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", f"sae_lab.{module}", *overrides, f"hydra.run.dir={folder}"],
            check=True,
            capture_output=True,
        )
        return json.loads((Path(folder) / f"{module}.json").read_text())


def main() -> None:
    stages = figures("throughput", "slice_tokens=32_768")["tokens_per_second"]
    print(f"text: {stages['text']:_.0f}", flush=True)
    print(f"cache_write: {512 * stages['cache write']:.2e}\ncache_read: {512 * stages['cache read']:.2e}")
    print("forward:")
    print(f"  - {{parameters: 0.595e6, d: 128, n_layers: 3, tokens_per_second: {stages['forward']:_.0f}}}")
    print("step:", flush=True)
    for sae, d, f, k, b in STEPS:
        size = [f"sae={sae}", f"d_in={d}", f"n_latents={f}", f"k={k}", f"batch_size={b}"]
        ms = figures("benchmark", *size, "dense=false", "repeats=5")["step_ms"]
        sparse = str(sae != "vanilla").lower()
        print(
            f"  - {{d_in: {d}, n_latents: {f:_}, k: {k}, batch_size: {b}, sparse: {sparse}, ms: {ms:.1f}}}", flush=True
        )


if __name__ == "__main__":
    main()
