"""The training SAEs of SAELens, through its SAETrainer."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from coding import Coder, Rows, coder_of
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

FAMILIES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batch_topk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}
NORM_BATCHES = 100
"""Batches from which the scale of the activations is estimated. They are trained on as well."""


def train(family: str, rate: float | None, rows: Rows, size: dict, seed: int, folder: Path) -> tuple[Coder, Coder, str]:
    """Train and return (deployed, trained, settings). `rate` None: its defaults, no normalisation and no schedule."""
    torch.manual_seed(seed)
    kind, config = FAMILIES[family]
    normalize = "none" if rate is None else "expected_average_only_in"
    cfg = config(d_in=size["d"], d_sae=size["n_latents"], normalize_activations=normalize, **settings_of(family, size))
    sae = SAETrainer(trainer_config(rate, rows, normalize), kind(cfg), provider(rows, normalize)).fit()
    sae.eval().save_inference_model(folder)
    deployed = SAE.load_from_disk(folder)
    settings = "its defaults" if rate is None else normalize
    return coder_of(deployed.encode, deployed.decode), coder_of(training_encoder(sae), sae.decode), settings


def training_encoder(sae: TrainingSAE):
    return lambda x: sae.encode_with_hidden_pre(x)[0]


def settings_of(family: str, size: dict) -> dict:
    """Return the settings that say what is trained. JumpReLU aims at k by the quadratic loss."""
    if family == "jumprelu":
        return {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(size["k"])}
    widths = {"matryoshka_widths": size["prefixes"]} if family == "matryoshka" else {}
    return {"k": size["k"]} | widths


def trainer_config(rate: float | None, rows: Rows, normalize: str) -> SAETrainerConfig:
    n_steps = len(rows)
    schedule = (
        {"lr_end": 3e-5}  # without effect under the constant schedule, but required
        if rate is None
        else {"lr": rate, "lr_end": rate / 10, "lr_warm_up_steps": n_steps // 20, "lr_decay_steps": n_steps // 5}
    )
    return SAETrainerConfig(
        total_training_samples=n_steps * rows.batch_size,
        train_batch_size_samples=rows.batch_size,
        n_batches_for_norm_estimate=min(NORM_BATCHES, n_steps),
        **schedule,
    )


def provider(rows: Rows, normalize: str) -> Iterator[Tensor]:
    """Return the training rows, after those that the trainer takes to estimate their scale."""
    first = islice(rows, NORM_BATCHES) if normalize != "none" else ()
    return chain(first, rows)
