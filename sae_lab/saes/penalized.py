"""Linear SAEs whose codes are sparse because of a penalty: what Vanilla, Gated and JumpReLU share."""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.parallel.collectives import concatenate_ranks
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.seeds import nth_generator
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.parts.resample import SCALE, draw_badly_reconstructed, scale_to_unit_norm


class PenalizedLinearSAE(LinearSAE):
    """A LinearSAE that is sparse because its loss says so: with h whole, its bias, and a penalty that warms up.

    Where rows of W_dec have unit norm, a penalty that others weigh by them (z_i |W_dec_i|) is the plain one.

    Args:
        sparsity_warmup: training batches over which the penalty's coefficient rises linearly to its full size; 0
            starts with that. Dead latents come from a penalty that acts before there is a reconstruction.
        resample_every: training batches after which, again and again, each dead latent takes the direction of a row
            that is reconstructed badly (drawn with probability ∝ |x - x_hat|⁴; at most one latent a row of the batch),
            in the decoder at unit norm and in the encoder at 0.2 of the mean norm of those alive; its bias is zero. 0
            never does. An alternative to the auxiliary loss: Bricken et al. 2023 (Towards Monosemanticity). A rule
            over the k largest would not let such a latent in.

    Raises:
        UserError: a number that cannot be, or resample_every with a decoder that is frozen.
    """

    foldable = True

    def __init__(
        self,
        sparsity_warmup: Annotated[int, Ge(0)] = 0,
        resample_every: Annotated[int, Ge(0)] = 0,
        encoder_bias: bool = True,
        **linear: Any,
    ):
        super().__init__(encoder_bias=encoder_bias, **linear)
        self.sparsity_warmup, self.resample_every = sparsity_warmup, resample_every
        if resample_every and self.frozen_decoder:
            raise SettingError(
                "{resample_every} rewrites the decoder, which {frozen_decoder}=true forbids: choose one of them."
            )

    @torch.no_grad()
    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        if not self.resample_every or (step := int(self.steps)) == 0 or step % self.resample_every:
            return []
        x, _ = concatenate_ranks(x)
        dead, alive = self.dead().nonzero().squeeze(-1)[: len(x)], ~self.dead()
        if len(dead) == 0 or not alive.any():
            return []
        read, target = self.sources(self.as_rows(x))
        error = target - self.decode_normalized(self.code(read), read)
        drawn = draw_badly_reconstructed(error.square().sum(dim=(1, 2)), len(dead), nth_generator(self.seed, step))
        length = SCALE * self.W_enc[alive].flatten(1).norm(dim=1).mean()
        self.W_enc[dead] = length * scale_to_unit_norm(read[drawn] - self.encoder_center())
        self.W_dec[dead] = scale_to_unit_norm(target[drawn] - self.b_dec)
        for parameter, value in self.resampled_values():
            parameter[dead] = value
        self.batches_since_fired[dead] = 0
        return [(parameter, dead) for parameter in (self.W_enc, self.W_dec, *(p for p, _ in self.resampled_values()))]

    def resampled_values(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters that a latent has beside its encoder and decoder, and what a resampled one starts with."""
        fresh = [] if self.b_enc is None else [(self.b_enc, 0.0)]
        return fresh if self.mlp is None else [*fresh, (self.mlp.W_out, 0.0)]

    def scale_by_warmup(self, penalty: Tensor) -> Tensor:
        """The penalty as much as this batch, the `steps`-th, may feel of it."""
        return penalty * (self.steps / self.sparsity_warmup).clamp_max(1) if self.sparsity_warmup else penalty
