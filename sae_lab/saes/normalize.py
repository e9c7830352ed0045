"""What an SAE does to raw activations before it sees them, and how x_hat gets its units back."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.errors import UserError


class Context(NamedTuple):
    """What undoes a normalisation: raw = normalised * scale + shift. Belongs to the rows, not to the module."""

    scale: Tensor | float
    shift: Tensor | float


class Normalizer(nn.Module):
    """Leaves activations as they are."""

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        return x, Context(1.0, 0.0)

    @staticmethod
    def undo(x: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        return x * context.scale + context.shift


class PerToken(Normalizer):
    """x -> (x - mean_d x) / (std_d x + 1e-5), each row and source by itself; std is unbiased (d - 1).

    The write-up's normalisation ("input_unit_norm"), OpenAI's, and SAELens' layer_norm. As there, what undoes it has
    no 1e-5: raw = normalised · std + mean. A normalised row has mean square (d - 1) / d.
    """

    EPS = 1e-5

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean  # torch.std_mean takes eight times longer than all of this
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
        return centred / (std + self.EPS), Context(std, mean)


class ConstantNorm(Normalizer):
    """x -> x sqrt(d) / |x|, each row and source by itself: the `constant_norm_rescale` of SAELens."""

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), Context(scale, 0.0)


NORMALIZERS: dict[str, type[Normalizer]] = {
    "none": Normalizer,
    "per_token": PerToken,
    "constant_norm": ConstantNorm,
}


def normalizer(name: str) -> Normalizer:
    """The normalizer of this name.

    Raises:
        UserError: there is none.
    """
    if name not in NORMALIZERS:
        raise UserError(f"sae.normalize={name} is not known: choose one of {', '.join(NORMALIZERS)}.")
    return NORMALIZERS[name]()
