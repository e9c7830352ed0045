"""SAE Lab: train, evaluate and sweep sparse autoencoders on language models.

from sae_lab import load_sae

sae = load_sae("outputs/demo")        # a run, or a file, folder or release of another library
code = sae.encode(x)                  # raw activations (b, d) or (b, s, d) -> (b, f)
x_hat = sae.reconstruct(x)            # in the units of x
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    "load_run",
    "load_sae",
    "save_sae",
]

_HOMES = {"load_run": "runs.loading", "load_sae": "interop.load", "save_sae": "saes.files"}  # the others: saes


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `--help` needs neither torch nor Lightning (4 s)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'saes')}"), name)
