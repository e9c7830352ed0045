"""Small runs that share a stream, for the tests of groups and of several processes."""

import os
import signal
from pathlib import Path

import pandas as pd
import torch
from conftest import compose, equal

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.training.run import train_run

N_STEPS = 12
SMALL = [
    f"n_tokens={N_STEPS * 128}",
    "batch_size=128",
    "seq_len=32",
    "expansion=2",
    "data.block_tokens=512",
    "data.lm_batch_rows=4",
    "data.n_eval_tokens=256",
    "data.n_val_tokens=128",
    "calibration_batches=3",
    "trainer.validate_every=5",
    "trainer.checkpoint_every=4",
    "trainer.log_every=3",
]


def config(folder: Path, *overrides: str):
    return compose(*SMALL, *overrides, f"run_dir={folder}")


def train_each(root: Path, members: dict[str, list[str]]) -> Path:
    """Every member's run, by itself."""
    for name, overrides in members.items():
        train_run(config(root / name, *overrides))
    return root


def stop_at_batch(monkeypatch, n: int, signum: signal.Signals = signal.SIGTERM, stream=ShuffledBlocks) -> None:
    """A signal to this process where the n-th batch is asked for, which stops it after n - 1 steps."""
    draw, drawn = stream.__next__, []

    def stopping(self):
        drawn.append(None)
        if len(drawn) == n:
            os.kill(os.getpid(), signum)
        return draw(self)

    monkeypatch.setattr(stream, "__next__", stopping)


def assert_same_run(theirs: Path, ours: Path) -> None:
    """Weights, metrics, the whole checkpoint but for paths, and the training log but for speed."""
    for file in ("metrics.json", "sae/sae.safetensors", "figures/l0_per_token.csv"):
        assert (theirs / file).read_bytes() == (ours / file).read_bytes(), file
    a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (theirs, ours))
    assert a.keys() == b.keys()
    for key in a.keys() - {"callbacks"}:
        assert equal(a[key], b[key]), key
    logs = [pd.read_csv(f / "metrics.csv").drop(columns="tokens_per_second") for f in (theirs, ours)]
    pd.testing.assert_frame_equal(*logs)
