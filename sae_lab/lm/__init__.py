"""Frozen language models: `base.py` is the contract, each back end has a file, `tiny/` holds the bundled model."""

from sae_lab.lm.base import LanguageModel
from sae_lab.lm.nnsight import NnsightLM
from sae_lab.lm.paired import PairedLM
from sae_lab.lm.transformer_lens import TransformerLensLM
from sae_lab.lm.transformers import TransformersLM

__all__ = ["LanguageModel", "NnsightLM", "PairedLM", "TransformerLensLM", "TransformersLM"]
