"""Normalization of raw activations, and how it is undone in x_hat."""

import math
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.runtime.errors import UserError


class Context(NamedTuple):
    """What undoes a normalization: raw = normalized * scale + shift. Belongs to the rows, not to the module."""

    scale: Tensor | float
    shift: Tensor | float


class Normalizer(nn.Module):
    """Base class, which leaves activations as they are.

    Args:
        n_sources: s.
    """

    shared: ClassVar[bool] = False
    """Whether all rows are divided by the same `divisor()`, which can be folded into the weights."""
    by_row: ClassVar[bool] = False
    """Whether the context of a row depends on the row itself."""

    def __init__(self, n_sources: int = 1):
        super().__init__()

    def observe(self, x: Float[Tensor, "b s d"]) -> None:
        """Measure, on a training batch, what all rows share. Called before the forward pass."""

    def constant(self) -> Context:
        """Return the context of every row. Not for normalizers that are `by_row`."""
        return Context(1.0, 0.0)

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        """Return the normalized rows, and the context that undoes the normalization."""
        return x, self.constant()

    @staticmethod
    def undo(x: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        """Return normalized rows in raw units."""
        return x * context.scale + context.shift


class PerToken(Normalizer):
    """Normalizes each row and source by itself to mean 0 and std 1.

        x -> (x - mean_d x) / (std_d x + 1e-5)        with the unbiased std (d - 1)

    The same as "input_unit_norm" of the write-up, the normalization of OpenAI's SAEs, and layer_norm of SAELens. As
    there, it is undone without the 1e-5: raw = normalized · std + mean. A normalized row has mean square (d - 1) / d.
    """

    by_row = True
    EPS = 1e-5

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        mean = x.mean(dim=-1, keepdim=True)
        centered = x - mean  # torch.std_mean takes eight times longer than this function
        std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
        return centered / (std + self.EPS), Context(std, mean)


class ConstantNorm(Normalizer):
    """Scales each row and source by itself to norm sqrt(d).

        x -> x sqrt(d) / |x|

    The same as `constant_norm_rescale` of SAELens.
    """

    by_row = True

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), Context(scale, 0.0)


class MeanNorm(Normalizer):
    """Divides each source by one number, so that its mean norm becomes sqrt(d).

        x -> x / scale,   scale_s = mean_rows |x_s| / sqrt(d)

    Directions, relative lengths and the origin do not change, and learning rates and coefficients for inputs of unit
    std suit any model. All rows have the same scale, so it can be folded into the weights: an SAE that is exported to
    another library needs no normalization. The same as SAELens' expected_average_only_in; Anthropic, April 2024.
    (dictionary_learning divides by another constant, (mean |x|²)^½; folded weights do not show which one it was.)

    The scale is measured on the first training batch, over the rows of all ranks, and then fixed. It is saved with the
    weights, which are in its units. Its relative standard error is sd(|x|) / (mean(|x|) sqrt(b)). With b = 1024 this is
    0.4 % on the bundled model, where norms vary by a tenth. It is 10 % if BOS, one row in 128, is 50 times longer than
    the other rows, unless data.exclude_bos leaves it out. Such an error only multiplies all rows by a constant.

    Raises:
        UserError: rows are normalized before the scale is measured; or a source of the first batch is zero or not
            finite.
    """

    shared = True
    scale: Tensor
    """(s, 1); zero until it is measured."""

    def __init__(self, n_sources: int = 1):
        super().__init__(n_sources)
        self.register_buffer("scale", torch.zeros(n_sources, 1))
        self._has_scale = False

    @property
    def has_scale(self) -> bool:
        """Whether the scale is measured. Reads the buffer only until it is, since reading waits for the GPU."""
        self._has_scale = self._has_scale or bool((self.scale > 0).all())
        return self._has_scale

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "b s d"]) -> None:
        if self.has_scale:
            return
        norm = mean_over_ranks(torch.linalg.vector_norm(x, dim=-1).mean(dim=0))
        if not (norm.isfinite() & (norm > 0)).all():
            raise UserError(
                f"sae.normalize=mean_norm cannot divide by the mean norms of the first batch, {norm.tolist()} by "
                "source: leave out the source that is zero or not finite."
            )
        self.scale.copy_(norm.unsqueeze(-1) / math.sqrt(x.shape[-1]))

    def divisor(self) -> Float[Tensor, "s 1"]:
        """Return the scale.

        Raises:
            UserError: it is not measured yet.
        """
        if not self.has_scale:
            raise UserError(
                "sae.normalize=mean_norm has no scale before training, since the first batch sets it: train this SAE, "
                "or load a trained one."
            )
        return self.scale

    def constant(self) -> Context:
        return Context(self.divisor(), 0.0)

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        context = self.constant()
        return x / context.scale, context


Normalization: TypeAlias = Literal["none", "per_token", "constant_norm", "mean_norm"]
NORMALIZERS: dict[Normalization, type[Normalizer]] = {
    "none": Normalizer,
    "per_token": PerToken,
    "constant_norm": ConstantNorm,
    "mean_norm": MeanNorm,
}
