"""A sweep killed by SIGKILL at random moments, and relaunched each time, ends equal to an uninterrupted one to the bit.

    python tests/kill_sweep.py FOLDER [kills] [launcher]

Runs the sweep once in FOLDER/whole; then in FOLDER/killed, killing it after a random time (of a whole sweep's time) as
often as asked, and lets the last launch run to its end. Prints what each launch left, and says whether all is equal.
"""

import hashlib
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from sae_lab.runs import Run
from sae_lab.sweep import plan, standing

DIALS = """# @package _global_
n_tokens: 24_576
batch_size: 256
seq_len: 32
expansion: 2
calibration_batches: 2
data: {block_tokens: 2048, lm_batch_rows: 8, n_eval_tokens: 512, n_val_tokens: 256}
trainer: {log_every: 5, validate_every: 20, checkpoint_every: 5}
"""


def command(root: Path, folder: Path, launcher: str) -> list[str]:
    (root / "experiment").mkdir(parents=True, exist_ok=True)
    (root / "experiment" / "killed.yaml").write_text(DIALS)
    dials = ["experiment=killed", "sae=topk,vanilla", "optimizer.lr=1e-3,3e-3"]
    where = [f"hydra.sweep.dir={folder}", f"hydra/launcher={launcher}"]
    return [sys.executable, "-m", "sae_lab.train", f"--config-dir={root}", "-m", *dials, *where]


def fingerprint(folder: Path) -> dict[str, str]:
    """What must be equal: metrics, weights, optimizer, place in the stream."""
    files = ["metrics.json", "sae/sae.safetensors"]
    prints = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    state = torch.load(Run(folder, 0, False).last_checkpoint, weights_only=True)
    kept = {key: value for key, value in state.items() if key != "callbacks"}
    return prints | {"checkpoint": hashlib.sha256(repr(plain(kept)).encode()).hexdigest()}


def plain(tree):
    """Tensors as their bytes."""
    if isinstance(tree, torch.Tensor):
        return tree.view(-1).view(torch.uint8).numpy().tobytes() if tree.numel() else b""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def main(root: Path, kills: int = 10, launcher: str = "shared_stream", seed: int = 0) -> bool:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.perf_counter()
    subprocess.run(command(root, root / "whole", launcher), check=True, **quiet)
    whole = time.perf_counter() - start
    chance, finished = random.Random(seed), dict[Path, int]()
    for i in range(kills):
        process = subprocess.Popen(command(root, root / "killed", launcher), **quiet)
        try:
            process.wait(whole * chance.uniform(0.3, 0.9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        standings = [standing(folder) for folder in plan(root / "killed")]
        print(i, Counter(status for status, _ in standings), [detail for _, detail in standings if detail], flush=True)
        done = {
            f / "metrics.json": (f / "metrics.json").stat().st_mtime_ns
            for f in plan(root / "killed")
            if (f / "metrics.json").is_file()
        }
        assert all(done[path] == at for path, at in finished.items()), "a finished job was run again"
        finished = done
    subprocess.run(command(root, root / "killed", launcher), check=True, **quiet)
    pairs = [(root / "whole" / folder.name, folder) for folder in plan(root / "killed")]
    equal = [fingerprint(a) == fingerprint(b) for a, b in pairs]
    print(f"{sum(equal)} of {len(equal)} jobs are equal to the bit after {kills} kills")
    return len(equal) == 4 and all(equal)


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    sys.exit(not main(Path(folder), *(int(x) for x in rest[:1]), *rest[1:]))
