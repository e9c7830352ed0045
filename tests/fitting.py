"""A module fitted to a few batches."""

from functools import partial

import lightning as L
import torch
from conftest import planted
from torch.utils.data import DataLoader

from sae_lab.saes.base import BaseSAE
from sae_lab.training.module import SAEModule
from sae_lab.training.schedule import warmup_decay

DEAD = "sae.dead_after=2"
"""Makes latents die within the few batches of a test."""
TRANSCODER = "sae.n_inputs=1"

N_STEPS = 12
BATCHES = [planted(32, seed=i)[0] for i in range(N_STEPS)]


def fit(
    sae: BaseSAE,
    max_grad_norm: float | None = None,
    fused: bool = True,
    batches=BATCHES,
    ckpt=None,
    n_steps: int = N_STEPS,
    **trainer,
) -> SAEModule:
    module = SAEModule(
        sae,
        partial(torch.optim.Adam, lr=1e-2, fused=fused),
        partial(warmup_decay, n_steps=n_steps, warmup=0.25, decay=0.5),
        max_grad_norm,
    )
    quiet = {
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", **(quiet | trainer)).fit(
        module, DataLoader(batches, batch_size=None), ckpt_path=ckpt, weights_only=True
    )
    return module
