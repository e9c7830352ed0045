"""A sweep killed by SIGKILL at random moments, and relaunched each time, ends equal to an uninterrupted one to the bit.

    python tests/kill_sweep.py FOLDER [kills] [launcher]

Runs one job of a sweep in FOLDER/killed, then the sweep, killing it as often as asked, and then to its end; and once in
FOLDER/whole. Prints what each launch left, and whether all is equal.
"""

import hashlib
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from shell import Forked, run

from sae_lab.runs.folder import Run
from sae_lab.sweeps.status import planned_jobs, read_status

DIALS = """# @package _global_
n_tokens: {n_tokens}
batch_size: 256
seq_len: 32
expansion: 2
calibration_batches: 2
data: {{block_tokens: 2048, lm_batch_rows: 8, n_eval_tokens: 512, n_val_tokens: 256}}
trainer: {{log_every: 5, validate_every: 20, checkpoint_every: 5}}
"""


ONE = ["sae=topk", "lm.sites=[transformer.h.1]"]
FOUR = ["sae=topk,vanilla", "lm.sites=[transformer.h.1],[transformer.h.3,transformer.h.0]"]


def overrides(root: Path, folder: Path, launcher: str, kills: int, dials: list[str] = FOUR) -> list[str]:
    """The sweep's command; so long that all kills find it at work."""
    (root / "experiment").mkdir(parents=True, exist_ok=True)
    (root / "experiment" / "killed.yaml").write_text(DIALS.format(n_tokens=max(12_288, 2_560 * kills)))
    where = [f"hydra.sweep.dir={folder}", f"hydra/launcher={launcher}"]
    return [f"--config-dir={root}", "-m", "experiment=killed", *dials, *where]


def fingerprint(folder: Path) -> dict[str, str]:
    """What must be equal: metrics, weights, optimizer, place in the stream."""
    files = ["metrics.json", "sae/sae.safetensors"]
    prints = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    state = torch.load(Run(folder, 0, False).last_checkpoint, weights_only=True)
    # Not Lightning's own counts of batches: one that is killed between the last step's checkpoint and the end of its
    # loop counts one batch less, one that continues from a step that is validated counts that validation twice.
    kept = {key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    kept["place"] = state["ActivationData"]
    return prints | {"checkpoint": hashlib.sha256(repr(plain(kept)).encode()).hexdigest()}


def plain(tree):
    """Tensors as their bytes."""
    if isinstance(tree, torch.Tensor):
        return tree.cpu().view(-1).view(torch.uint8).numpy().tobytes() if tree.numel() else b""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def kill_at_random(process: Forked, root: Path, chance: random.Random) -> None:
    """Some time after a random number of checkpoints has been written.

    Raises:
        AssertionError: the sweep ended first.
    """

    def written() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in root.glob("*/checkpoints/last.ckpt")}

    before, enough, new = written(), chance.randint(1, 8), set[tuple[Path, int]]()
    while process.running and len(new) < enough:
        new |= written() - before
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.1))
    if process.running:
        process.send_signal(signal.SIGKILL)
    assert process.communicate().returncode == -signal.SIGKILL, "the sweep ended before it could be killed"


def main(root: Path, kills: int = 10, launcher: str = "shared_stream", seed: int = 0) -> bool:
    killed, chance = root / "killed", random.Random(seed)
    assert run(*overrides(root, killed, launcher, kills, ONE)).returncode == 0
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*/metrics.json")}
    for i in range(kills):
        kill_at_random(Forked(*overrides(root, killed, launcher, kills)), killed, chance)
        jobs = [read_status(folder) for folder in planned_jobs(killed)]
        print(i, dict(Counter(status for status, _ in jobs)), [detail for _, detail in jobs], flush=True)
        done = {path: path.stat().st_mtime_ns for path in killed.glob("*/metrics.json")}
        assert finished.items() <= done.items(), "a finished job was run again"
        finished = done
    for folder in ("killed", "whole"):
        done = run(*overrides(root, root / folder, launcher, kills))
        assert done.returncode == 0, done.stderr
    # The first sweep has one job, whose name leaves nothing out; a sweep that continues it keeps such names.
    whole = {folder: root / "whole" / folder.name.removeprefix("experiment=killed,") for folder in planned_jobs(killed)}
    equal = [fingerprint(whole[folder]) == fingerprint(folder) for folder in planned_jobs(killed)]
    print(f"{sum(equal)} of {len(equal)} jobs are equal to the bit after {kills} kills")
    return len(equal) == 4 and all(equal)


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    sys.exit(not main(Path(folder), *(int(x) for x in rest[:1]), *rest[1:]))
