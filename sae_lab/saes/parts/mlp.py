"""The MLP of an encoder, added to the linear encoder."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """MLP that is added to a linear encoder, which acts as its skip connection.

        a_0  = x - b_dec, the input of the linear encoder
        a_l  = relu(V_l a_{l-1} + c_l)
        h_i += W_out_i · a_n

    W_out starts at zero, so an SAE that gets an MLP at first computes the same as without it. V is uniform in
    ±sqrt(6 / fan-in) (Kaiming), c starts at zero.

    After the MLP encoders of sae-kit. Their random last layer does not start from the pretrained SAE.

    Args:
        n_inputs: length of a_0.
        hidden: lengths of a_1, a_2, ..., a_n; at least one.
        n_latents: f.
    """

    def __init__(self, n_inputs: int, hidden: Sequence[int], n_latents: int):
        super().__init__()
        self.V = nn.ParameterList(torch.empty(m, n) for n, m in pairwise([n_inputs, *hidden]))
        self.c = nn.ParameterList(torch.zeros(m) for m in hidden)
        self.W_out = nn.Parameter(torch.zeros(n_latents, hidden[-1]))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw V."""
        for V in self.V:
            bound = math.sqrt(6 / V.shape[1])
            V.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b m"]:
        """Compute a_n from a_0."""
        for V, c in zip(self.V, self.c, strict=True):
            x = F.linear(x, V, c).relu()
        return x
