"""What an MLP adds to a linear encoder."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """h_i += W_out_i · a_n,   a_l = relu(V_l a_{l-1} + c_l),   a_0 the linear encoder's input, x - b_dec

    The linear encoder is the skip connection. W_out starts at zero, so an SAE that is given an MLP is at first the SAE
    that it was. V is uniform in ±sqrt(6 / fan-in) (Kaiming), c starts at zero.

    After sae-kit's MLP encoders, whose random last layer is not a start from the pretrained SAE.

    Args:
        n_inputs: the length of a_0.
        hidden: the length of every a_l after it, at least one.
        n_latents: f.
    """

    def __init__(self, n_inputs: int, hidden: Sequence[int], n_latents: int):
        super().__init__()
        self.V = nn.ParameterList(torch.empty(m, n) for n, m in pairwise([n_inputs, *hidden]))
        self.c = nn.ParameterList(torch.zeros(m) for m in hidden)
        self.W_out = nn.Parameter(torch.zeros(n_latents, hidden[-1]))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        for V in self.V:
            bound = math.sqrt(6 / V.shape[1])
            V.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b m"]:
        for V, c in zip(self.V, self.c, strict=True):
            x = F.linear(x, V, c).relu()
        return x
