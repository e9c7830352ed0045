"""Sparse autoencoders: the interface in base.py, the shared maths in linear.py, one file per family.

Imports every module of this folder, so that a saved SAE of any family can be loaded by its class name.
"""

from importlib import import_module
from pkgutil import iter_modules

from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.dictionary import DictionarySAE
from sae_lab.saes.gated import GatedSAE
from sae_lab.saes.hierarchical_topk import HierarchicalTopKSAE
from sae_lab.saes.jumprelu import JumpReLUSAE
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.matryoshka import MatryoshkaSAE, MatryoshkaTopKSAE
from sae_lab.saes.p_anneal import PAnnealGatedSAE, PAnnealSAE
from sae_lab.saes.pursuit_sae import PursuitSAE
from sae_lab.saes.route import RouteSAE
from sae_lab.saes.temporal import TemporalSAE
from sae_lab.saes.topk import TopKSAE
from sae_lab.saes.vanilla import VanillaSAE

__all__ = [
    "BaseSAE",
    "BatchTopKSAE",
    "DictionarySAE",
    "GatedSAE",
    "HierarchicalTopKSAE",
    "JumpReLUSAE",
    "LinearSAE",
    "MatryoshkaSAE",
    "MatryoshkaTopKSAE",
    "PAnnealGatedSAE",
    "PAnnealSAE",
    "PursuitSAE",
    "RouteSAE",
    "SAEOutput",
    "TemporalSAE",
    "TopKSAE",
    "VanillaSAE",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
