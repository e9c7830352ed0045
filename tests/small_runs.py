"""A small run of the command line, and what several tests assert of one."""

import subprocess
import time
from pathlib import Path

import pandas as pd
import torch
from conftest import equal
from shell import Forked, run

N_EVAL = 2048
SMALL = [
    "n_tokens=30_000",
    "expansion=4",
    "seq_len=64",
    "data.block_tokens=10_000",
    f"data.n_eval_tokens={N_EVAL}",
    "data.n_val_tokens=1024",
    "calibration_batches=5",
    "trainer.validate_every=20",
    "trainer.checkpoint_every=15",
    "trainer.log_every=10",
]
N_STEPS = 30_000 // 1024 + 1  # the last one smaller


def assert_continues_to_the_bits_of(whole_dir: Path, folder: Path, dials: list[str], stop, n_steps: int, threads=1):
    """Stop the same run by a signal after its first checkpoint, and start it again."""
    overrides = [*dials, f"hydra.run.dir={folder}"]
    forked = Forked(*overrides, threads=threads)
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert forked.running, forked.communicate().stderr
        time.sleep(0.01)
    forked.send_signal(stop)
    stopped = forked.communicate()
    assert stopped.returncode == 128 + stop
    assert f"Stopped by {stop.name} at step" in stopped.stderr.splitlines()[-1]
    assert not (folder / "metrics.json").exists()
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < n_steps

    again = run(*overrides, threads=threads)
    assert again.returncode == 0, again.stderr
    assert f"continuing from step {step}" in again.stderr
    kept = [str(file.relative_to(whole_dir)) for file in whole_dir.glob("steps/*/sae.safetensors")]
    assert len(kept) == (n_steps // 4 if "callbacks=keep_saes" in dials else 0)
    for file in ("metrics.json", "sae/sae.safetensors", *kept):
        assert (folder / file).read_bytes() == (whole_dir / file).read_bytes(), file
    whole, resumed = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole_dir, folder))
    assert whole["global_step"] == resumed["global_step"] == n_steps
    [place] = {"ActivationData", "TensorData"} & whole.keys()
    assert whole[place] == resumed[place]
    assert equal(whole["optimizer_states"], resumed["optimizer_states"])
    logs = [pd.read_csv(f / "metrics.csv").drop(columns="tokens_per_second") for f in (whole_dir, folder)]
    pd.testing.assert_frame_equal(*logs)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
