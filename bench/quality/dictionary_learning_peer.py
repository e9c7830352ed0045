"""The trainers of dictionary_learning, through its trainSAE."""

from functools import partial
from pathlib import Path

import torch
from coding import Coder, Rows, coder_of
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

FAMILIES = {
    "topk": (TopKTrainer, AutoEncoderTopK),
    "batch_topk": (BatchTopKTrainer, BatchTopKSAE),
    "matryoshka": (MatryoshkaBatchTopKTrainer, MatryoshkaBatchTopKSAE),
    "jumprelu": (JumpReluTrainer, JumpReluAutoEncoder),
}


def train(family: str, rate: float | None, rows: Rows, size: dict, seed: int, folder: Path) -> tuple[Coder, Coder, str]:
    """Train and return (deployed, trained, settings). `rate` None: the defaults of trainSAE and of the trainer.

    Counts of steps that do not fit into the run (1,000 of warm-up, 2,000 of the sparsity's) become half the run.
    """
    trainer, kind = FAMILIES[family]
    torch.manual_seed(seed)
    config = {"trainer": trainer, "activation_dim": size["d"], "dict_size": size["n_latents"], "steps": len(rows)}
    config |= {"layer": 0, "lm_name": "none", "device": "cpu", "seed": seed}
    config |= settings_of(family, size) | schedule_of(family, rate, len(rows))
    trainSAE(rows, [config], len(rows), save_dir=str(folder), normalize_activations=rate is not None, device="cpu")
    sae = kind.from_pretrained(folder / "trainer_0" / "ae.pt")
    batchwise = partial(sae.encode, use_threshold=False) if family in ("batch_topk", "matryoshka") else sae.encode
    settings = "its defaults" if rate is None else "normalize_activations"
    return coder_of(sae.encode, sae.decode), coder_of(batchwise, sae.decode), settings


def settings_of(family: str, size: dict) -> dict:
    """Return the settings that say what is trained."""
    if family == "jumprelu":
        return {"target_l0": float(size["k"])}
    groups = {"group_fractions": size["group_fractions"]} if family == "matryoshka" else {}
    return {"k": size["k"]} | groups


def schedule_of(family: str, rate: float | None, n_steps: int) -> dict:
    """Return the settings of rate and schedule, and the steps at which thresholds and penalties start."""
    half, twentieth = n_steps // 2, n_steps // 20
    late = {"sparsity_warmup_steps": min(2000, half)} if family == "jumprelu" else {}
    late |= {"threshold_start_step": min(1000, half)} if family != "jumprelu" else {}
    if rate is None:
        return late | {"warmup_steps": min(1000, half)}
    return late | {"lr": rate, "warmup_steps": twentieth, "decay_start": n_steps - n_steps // 5}
