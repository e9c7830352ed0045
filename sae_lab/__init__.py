"""SAE Lab: train, evaluate and sweep sparse autoencoders on language models.

from sae_lab import BatchTopKSAE, load_sae, train_sae

sae = BatchTopKSAE(k=8, d_in=64, n_latents=512)
run = train_sae(sae, x, n_tokens=500_000)   # raw activations (n, 64); run.metrics, run.folder
sae = load_sae(run.folder)                  # a run, or a file, folder or release of another library
code = sae.encode(x)                        # (n, 512)
x_hat = sae.reconstruct(x)                  # in the units of x
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lab.api.activations import Activations
    from sae_lab.api.composing import compose
    from sae_lab.api.encoders import with_encoder
    from sae_lab.api.evaluating import compute_metrics, evaluate_sae
    from sae_lab.api.language_models import load_lm, pair_lms
    from sae_lab.api.pursuits import gradient_pursuit, matching_pursuit, orthogonal_matching_pursuit
    from sae_lab.api.steps import calibrate, training_step
    from sae_lab.api.training import train_sae, train_sae_group
    from sae_lab.interop.load import load_sae
    from sae_lab.runs.loading import load_run
    from sae_lab.saes import (
        BaseSAE,
        BatchTopKSAE,
        GatedSAE,
        HierarchicalTopKSAE,
        JumpReLUSAE,
        MatryoshkaSAE,
        PursuitSAE,
        RouteSAE,
        SAEOutput,
        TemporalSAE,
        TopKSAE,
        VanillaSAE,
    )
    from sae_lab.saes.files import save_sae

__all__ = [
    "Activations",
    "BaseSAE",
    "BatchTopKSAE",
    "GatedSAE",
    "HierarchicalTopKSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "PursuitSAE",
    "RouteSAE",
    "SAEOutput",
    "TemporalSAE",
    "TopKSAE",
    "VanillaSAE",
    "calibrate",
    "compose",
    "compute_metrics",
    "evaluate_sae",
    "gradient_pursuit",
    "load_lm",
    "load_run",
    "load_sae",
    "matching_pursuit",
    "orthogonal_matching_pursuit",
    "pair_lms",
    "save_sae",
    "train_sae",
    "train_sae_group",
    "training_step",
    "with_encoder",
]

_NAMES = {
    "api.activations": ("Activations",),
    "api.composing": ("compose",),
    "api.encoders": ("with_encoder",),
    "api.evaluating": ("compute_metrics", "evaluate_sae"),
    "api.language_models": ("load_lm", "pair_lms"),
    "api.pursuits": ("gradient_pursuit", "matching_pursuit", "orthogonal_matching_pursuit"),
    "api.steps": ("calibrate", "training_step"),
    "api.training": ("train_sae", "train_sae_group"),
    "interop.load": ("load_sae",),
    "runs.loading": ("load_run",),
    "saes.files": ("save_sae",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}  # of the others: saes


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `--help` needs neither torch nor Lightning (4 s)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'saes')}"), name)
