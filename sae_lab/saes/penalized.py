"""Base class of linear SAEs with a sparsity penalty: Vanilla, Gated and JumpReLU."""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.ops import losses
from sae_lab.parallel.collectives import concatenate_ranks
from sae_lab.parallel.mesh import latent_axis
from sae_lab.parallel.parts import split_rows
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.seeds import nth_generator
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.parts.resample import SCALE, draw_badly_reconstructed, scale_to_unit_norm


class PenalizedLinearSAE(LinearSAE):
    """LinearSAE with a sparsity penalty, an encoder bias and dense pre-activations.

    If the rows of W_dec have unit norm, a penalty weighted by these norms (z_i |W_dec_i|) equals the unweighted one.

    Args:
        sparsity_warmup: training batches over which the penalty's coefficient rises linearly to its full value; 0: full
            value from the start. A penalty that acts before the SAE reconstructs anything leaves dead latents.
        resample_every: number of training batches after which dead latents are resampled, repeatedly; 0: never. A
            resampled latent gets the direction of a row that is reconstructed badly, drawn with probability
            ∝ |x - x_hat|⁴, at most one latent per row of the batch. Its decoder row has unit norm, its encoder row 0.2
            of the mean norm of live latents, and its bias is zero. An alternative to the auxiliary loss: Bricken et al.
            2023 (Towards Monosemanticity). It does not suit top-k rules, which would not select such a latent.

    Raises:
        UserError: a setting is out of range, or `resample_every` is used with `frozen_decoder`.
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
        if resample_every and latent_axis().size > 1:
            raise SettingError(
                "{resample_every} compares latents of all shards: give {resample_every}=0, or trainer.shard_latents=1."
            )
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
        parts = zip(split_rows(read), split_rows(target), strict=True)
        errors = torch.cat([self.squared_errors(*part) for part in parts])
        drawn = draw_badly_reconstructed(errors, len(dead), nth_generator(self.seed, step))
        length = SCALE * self.W_enc[alive].flatten(1).norm(dim=1).mean()
        self.W_enc[dead] = length * scale_to_unit_norm(read[drawn] - self.encoder_center())
        self.W_dec[dead] = scale_to_unit_norm(target[drawn] - self.b_dec)
        for parameter, value in self.resampled_values():
            parameter[dead] = value
        self.batches_since_fired[dead] = 0
        return [(parameter, dead) for parameter in (self.W_enc, self.W_dec, *(p for p, _ in self.resampled_values()))]

    def squared_errors(self, read: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"]) -> Float[Tensor, " b"]:
        """Return |x - x_hat|² of normalized rows."""
        return (target - self.decode_normalized(self.code(read), read)).square().sum(dim=(1, 2))

    def resampled_values(self) -> list[tuple[nn.Parameter, float]]:
        """Return the parameters of a latent besides W_enc and W_dec, each with the value that resampling sets."""
        values = [] if self.b_enc is None else [(self.b_enc, 0.0)]
        return values if self.mlp is None else [*values, (self.mlp.W_out, 0.0)]

    def scale_by_warmup(self, penalty: Tensor) -> Tensor:
        """Multiply the penalty by the warm-up factor min(steps / sparsity_warmup, 1)."""
        return penalty * (self.steps / self.sparsity_warmup).clamp_max(1) if self.sparsity_warmup else penalty

    def penalized(self, out: SAEOutput) -> Float[Tensor, "b f"]:
        """Return what `sparsity` is computed from: one number of at least 0 for each row and latent."""
        raise NotImplementedError

    def weigh(self, z: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Multiply each latent by the norm of its row of W_dec, where that is not one."""
        return z if self.unit_norm else z * self.decoder_norms()

    def sparsity(self, z: Float[Tensor, "b f"]) -> Tensor:
        """Compute the penalty on `penalized`, without its coefficient: the L1 norm."""
        return losses.l1(z)
