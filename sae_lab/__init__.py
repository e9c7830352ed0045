"""SAE Lab: train, evaluate and sweep sparse autoencoders on language models.

from sae_lab import load_sae
sae = load_sae("outputs/demo")          # or a file, folder or release of another library
code = sae.encode(activations)          # (b, d) or (b, s, d) -> (b, f)
x_hat = sae.reconstruct(activations)    # in the units of the activations
"""

from sae_lab.interop.load import load_sae
from sae_lab.saes import (
    BaseSAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    PursuitSAE,
    RouteSAE,
    SAEOutput,
    TopKSAE,
    VanillaSAE,
)
from sae_lab.saes.files import save_sae

__all__ = [
    "BaseSAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "PursuitSAE",
    "RouteSAE",
    "SAEOutput",
    "TopKSAE",
    "VanillaSAE",
    "load_sae",
    "save_sae",
]
