"""Small runs that share a stream, for the tests of groups and of several processes."""

import os
import signal
from pathlib import Path

from conftest import compose

from sae_lab.activations.buffer import ShuffledBlocks

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


def stop_at_batch(monkeypatch, n: int) -> None:
    """A SIGTERM to this process where the n-th batch is asked for, which stops it after n - 1 steps."""
    draw, drawn = ShuffledBlocks.__next__, []

    def stopping(self):
        drawn.append(None)
        if len(drawn) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    monkeypatch.setattr(ShuffledBlocks, "__next__", stopping)
