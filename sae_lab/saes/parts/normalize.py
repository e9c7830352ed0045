"""Normalization of raw activations, and how it is undone in x_hat."""

import math
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.parallel.mesh import data_axis
from sae_lab.runtime.errors import UserError


class Context(NamedTuple):
    """What undoes a normalization: raw = (normalized @ mixing) * scale + shift. Belongs to the rows, not to the module.

    `mixing` (s, d, d) is symmetric, and `unmixing` its inverse; None: the identity.
    """

    scale: Tensor | float
    shift: Tensor | float
    mixing: Tensor | None = None
    unmixing: Tensor | None = None


class Normalizer(nn.Module):
    """Base class, which leaves activations as they are.

    Args:
        n_sources: s.
        d_in: d.
    """

    shared: ClassVar[bool] = False
    """Whether all rows have the same context, measured on data, which can be folded into the weights."""
    by_row: ClassVar[bool] = False
    """Whether the context of a row depends on the row itself."""

    def __init__(self, n_sources: int, d_in: int):
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
        x = x if context.mixing is None else mix(x, context.mixing)
        return x * context.scale + context.shift

    def unwhiten(self, directions: Float[Tensor, "f s d"]) -> Float[Tensor, "f s d"]:
        """Return normalized directions as directions of activations: raw ones but for one factor per source."""
        return directions


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
    word: ClassVar[str] = "mean_norm"
    scale: Tensor
    """(s, 1); zero until it is measured."""

    def __init__(self, n_sources: int, d_in: int):
        super().__init__(n_sources, d_in)
        self.register_buffer("scale", torch.zeros(n_sources, 1))
        self._has_scale = False

    @property
    def has_scale(self) -> bool:
        """Whether the scale is measured. Reads the buffer only until it is, since reading waits for the GPU."""
        self._has_scale = self._has_scale or bool((self.scale > 0).all())
        return self._has_scale

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "b s d"]) -> None:
        if not self.has_scale:
            self.measure(x)

    def measure(self, x: Float[Tensor, "b s d"]) -> None:
        """Set the scale, and what else all rows share, by a batch."""
        norm = mean_over_ranks(torch.linalg.vector_norm(x, dim=-1).mean(dim=0))
        if not (norm.isfinite() & (norm > 0)).all():
            raise UserError(
                f"sae.normalize={self.word} cannot divide by the mean norms of the first batch, {norm.tolist()} by "
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
                f"sae.normalize={self.word} has no scale before training, since the first batch sets it: train this "
                "SAE, or load a trained one."
            )
        return self.scale

    def constant(self) -> Context:
        return Context(self.divisor(), 0.0)

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        context = self.constant()
        return x / context.scale, context


class Centred(MeanNorm):
    """Subtracts the mean of each source, then divides as MeanNorm does.

        x -> (x - shift) / scale,   shift_s = mean_rows x_s,   scale_s = mean_rows |x_s - shift_s| / sqrt(d)

    Where the mean is long compared with the spread, W_enc of an SAE whose b_dec starts at zero first learns the mean,
    and many latents die. Both statistics are those of the first training batch, over all ranks, and then fixed. An
    error of the mean is no bias, since b_dec learns what is left of it.
    """

    word = "centred"
    shift: Tensor
    """(s, d); zero until it is measured."""

    def __init__(self, n_sources: int, d_in: int):
        super().__init__(n_sources, d_in)
        self.register_buffer("shift", torch.zeros(n_sources, d_in))

    def measure(self, x: Float[Tensor, "b s d"]) -> None:
        shift = mean_over_ranks(x.double().mean(dim=0)).to(x)
        super().measure(x - shift)
        self.shift.copy_(shift)

    def constant(self) -> Context:
        return Context(self.divisor(), self.shift)

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        context = self.constant()
        return (x - context.shift) / context.scale, context


class Whiten(Centred):
    """Makes all directions of each source equally loud: ZCA whitening, after Centred.

        y = (x - shift) / scale                      (Centred)
        C = mean_rows yᵀ y = U diag(λ) Uᵀ            of each source by itself
        x -> y U diag(λ + RIDGE)^(-½) Uᵀ

    Of all whitenings, ZCA's changes rows least; the others differ from it by a rotation. The mean of λ is about 1, so
    directions of less than RIDGE of the mean variance are noise that stays small. The reconstruction loss weighs
    directions by their inverse variance, so at an equal loss the fvu, which is in raw units, is higher.

    C is that of the first training batch, over all ranks. Rows that are not in it have variance between
    (1 + sqrt(d / b))^-2 and (1 - sqrt(d / b))^-2 after whitening (Marchenko, Pastur 1967): 0.5 to 2.4 for b = 8 d.

    Bell, Sejnowski 1997; Kessy, Lewin, Strimmer 2018, arXiv 1512.00809.

    Raises:
        UserError: as MeanNorm; or the first batch has fewer than 2 d rows.
    """

    word = "whiten"
    RIDGE = 0.01
    ROWS_PER_DIMENSION = 2
    mixing: Tensor
    """(s, d, d); undoes whitening. The identity until it is measured, as its inverse, `unmixing`."""
    unmixing: Tensor

    def __init__(self, n_sources: int, d_in: int):
        super().__init__(n_sources, d_in)
        for name in ("mixing", "unmixing"):
            self.register_buffer(name, torch.eye(d_in).repeat(n_sources, 1, 1))

    def measure(self, x: Float[Tensor, "b s d"]) -> None:
        b, _, d = x.shape
        least = self.ROWS_PER_DIMENSION * d
        if b * data_axis().size < least:
            raise UserError(
                f"sae.normalize=whiten measures {d} x {d} covariances on the first batch, which needs at least {least} "
                f"rows, not {b * data_axis().size}: give batch_size={least} or more, or sae.normalize=centred."
            )
        super().measure(x)
        # In float64 on the CPU: the same bits on all ranks, and an eigenvalue of 1e-4 of the largest keeps its digits.
        y = ((x - self.shift) / self.scale).double().cpu().transpose(0, 1)
        variances, U = torch.linalg.eigh(mean_over_ranks(y.mT @ y / b))
        lengths = (variances.clamp_min(0) + self.RIDGE).sqrt().unsqueeze(-2)
        self.mixing.copy_(U * lengths @ U.mT)
        self.unmixing.copy_(U / lengths @ U.mT)

    def constant(self) -> Context:
        return Context(self.divisor(), self.shift, self.mixing, self.unmixing)

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Context]:
        y, context = super().forward(x)
        return mix(y, self.unmixing), context

    def unwhiten(self, directions: Float[Tensor, "f s d"]) -> Float[Tensor, "f s d"]:
        return mix(directions, self.mixing)


def mix(x: Float[Tensor, "b #s d"], matrix: Float[Tensor, "s d d"]) -> Float[Tensor, "b s d"]:
    """Multiply each row by the matrix of its source, in the precision of x: under autocast, too."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(matrix.dtype).transpose(0, 1) @ matrix).transpose(0, 1)


Normalization: TypeAlias = Literal["none", "per_token", "constant_norm", "mean_norm", "centred", "whiten"]
NORMALIZERS: dict[Normalization, type[Normalizer]] = {
    "none": Normalizer,
    "per_token": PerToken,
    "constant_norm": ConstantNorm,
    "mean_norm": MeanNorm,
    "centred": Centred,
    "whiten": Whiten,
}
