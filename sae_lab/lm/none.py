"""The place of a language model for data that are activations already."""

import torch

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.device import resolve_device


class NoLM:
    """No language model (`lm=none`); it only says on which device the activations are used."""

    @check_arguments
    def __init__(self, device: str = "auto"):
        self.device = torch.device(resolve_device(device))
