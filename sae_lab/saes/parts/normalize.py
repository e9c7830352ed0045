"""What an SAE does to raw activations before it sees them, and how x_hat gets its units back."""

import math
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.runtime.errors import UserError


class Context(NamedTuple):
    """What undoes a normalisation: raw = normalised * scale + shift. Belongs to the rows, not to the module."""

    scale: Tensor | float
    shift: Tensor | float


class Normalizer(nn.Module):
    """Leaves activations as they are.

    Args:
        n_sources: s.
    """

    shared: ClassVar[bool] = False
    """Whether all rows are divided by the same `divisor()`, which weights can take over."""
    by_row: ClassVar[bool] = False
    """Whether only the row itself tells what undoes its normalisation."""

    def __init__(self, n_sources: int = 1):
        super().__init__()

    def observe(self, x: Float[Tensor, "b s d"]) -> None:
        """Before the forward pass of a training batch: take from it what does not come from each row by itself."""

    def constant(self) -> Context:
        """What undoes the normalisation of any row; of those that do not normalise by row."""
        return Context(1.0, 0.0)

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        return x, self.constant()

    @staticmethod
    def undo(x: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        return x * context.scale + context.shift


class PerToken(Normalizer):
    """x -> (x - mean_d x) / (std_d x + 1e-5), each row and source by itself; std is unbiased (d - 1).

    The write-up's normalisation ("input_unit_norm"), OpenAI's, and SAELens' layer_norm. As there, what undoes it has
    no 1e-5: raw = normalised · std + mean. A normalised row has mean square (d - 1) / d.
    """

    by_row = True
    EPS = 1e-5

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean  # torch.std_mean takes eight times longer than all of this
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
        return centred / (std + self.EPS), Context(std, mean)


class ConstantNorm(Normalizer):
    """x -> x sqrt(d) / |x|, each row and source by itself: the `constant_norm_rescale` of SAELens."""

    by_row = True

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), Context(scale, 0.0)


class MeanNorm(Normalizer):
    """x -> x / scale,   scale_s = mean_rows |x_s| / sqrt(d), one number a source: the mean norm becomes sqrt(d)

    Directions, lengths relative to each other and the origin stay, and the learning rates and coefficients that suit
    inputs of unit std hold whatever the model's units. As the scale is one for all rows, weights can take it over:
    an export to another library has none. SAELens' expected_average_only_in; Anthropic, April 2024.
    (dictionary_learning divides by (mean |x|²)^½: another constant, which folded weights do not show.)

    The scale is that of the first training batch, of all ranks' rows; then it stands still, and is saved with the
    weights, which are in its units. Its relative standard error is sd(|x|) / (mean(|x|) sqrt(b)): with b = 1024 it is
    0.4 % on the bundled model, whose norms spread by a tenth, and 10 % where BOS, one row in 128, is 50 times as long
    as the others, unless data.exclude_bos leaves it out. Being off by a constant is all that this does.

    Raises:
        UserError: rows are to be normalised before there is a scale; or a source of the first batch is zero or not
            finite.
    """

    shared = True
    scale: Tensor
    """(s, 1); zero: not known yet."""

    def __init__(self, n_sources: int = 1):
        super().__init__(n_sources)
        self.register_buffer("scale", torch.zeros(n_sources, 1))
        self._known = False

    @property
    def known(self) -> bool:
        """Whether there is a scale; looked at until there is, and not more often: a GPU would have to be waited for."""
        self._known = self._known or bool((self.scale > 0).all())
        return self._known

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "b s d"]) -> None:
        if self.known:
            return
        norm = mean_over_ranks(torch.linalg.vector_norm(x, dim=-1).mean(dim=0))
        if not (norm.isfinite() & (norm > 0)).all():
            raise UserError(
                f"sae.normalize=mean_norm cannot divide by the mean norms of the first batch, {norm.tolist()} by "
                "source: leave out the source that is zero or not finite."
            )
        self.scale.copy_(norm.unsqueeze(-1) / math.sqrt(x.shape[-1]))

    def divisor(self) -> Float[Tensor, "s 1"]:
        """The scale.

        Raises:
            UserError: there is none yet.
        """
        if not self.known:
            raise UserError(
                "sae.normalize=mean_norm has no scale before training, whose first batch gives it: train this SAE, or "
                "load one that was trained."
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
