"""The maths that all SAEs with a linear encoder and a linear decoder share."""

import math
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab import losses, sparse
from sae_lab.auxk import auxk
from sae_lab.errors import UserError
from sae_lab.matmul import linear
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.normalize import Context, normalizer
from sae_lab.selection import Pieces, Preactivations
from sae_lab.sparse import Code, SparseCode, encoded, fired


class LinearSAE(BaseSAE):
    """h = (x - b_dec) W_encᵀ [+ b_enc],   z = activate(h),   x_hat = z W_dec + b_dec,   loss = mean (x - x_hat)² + aux

    x is the normalised input. Sums over inputs run over sources and dimensions together, so with s > 1 this is a
    crosscoder. Each row of W_dec has unit norm over (s, d); the part of its gradient that would change the norm is
    removed. A latent that has not fired in `dead_after` training batches is dead: the auxiliary loss gives the dead
    the residual to explain (see auxk.py).

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        seed: of the initial weights, drawn by a generator of this SAE's own.
        normalize: `per_token`, `none` or `constant_norm` (see saes/normalize.py).
        encoder_bias: whether h has b_enc.
        auxk_coefficient: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents may explain one row's residual; None is s·d / 2, after Gao et al. 2024, §A.2.
        dead_after: batches without firing after which a latent is dead.
    """

    batches_since_fired: Tensor

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        n_sources: int = 1,
        seed: int = 0,
        normalize: str = "per_token",
        encoder_bias: bool = False,
        auxk_coefficient: float = 0.0,
        k_aux: int | None = None,
        dead_after: int = 5,
    ):
        super().__init__()
        self.d_in, self.n_latents, self.n_sources, self.seed = d_in, n_latents, n_sources, seed
        self.normalize, self.encoder_bias = normalize, encoder_bias
        self.auxk_coefficient, self.k_aux, self.dead_after = auxk_coefficient, k_aux, dead_after
        self.normalizer = normalizer(normalize)
        self.W_enc = nn.Parameter(torch.empty(n_latents, n_sources, d_in))
        self.W_dec = nn.Parameter(torch.empty(n_latents, n_sources, d_in))
        self.b_dec = nn.Parameter(torch.zeros(n_sources, d_in))
        self.b_enc = nn.Parameter(torch.zeros(n_latents)) if encoder_bias else None
        self.register_buffer("batches_since_fired", torch.zeros(n_latents, dtype=torch.long))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """The write-up's: W_enc uniform in ±sqrt(6 / f) (Kaiming), W_dec its rows at unit norm, biases zero."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = math.sqrt(6 / self.n_latents)
        self.W_enc.uniform_(-bound, bound, generator=generator)
        self.W_dec.copy_(self.W_enc)
        self.normalize_decoder()

    @abstractmethod
    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        """Pre-activations -> code: what tells the architectures apart."""

    def preactivation(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b f"]:
        """h, from normalised rows."""
        return linear((x - self.b_dec).flatten(1), self.W_enc.flatten(1), self.b_enc)

    def code(self, x: Float[Tensor, "b s d"]) -> Code:
        """Normalised rows -> code, in the form that training and evaluation work with."""
        return self.response(x)[0]

    def response(self, x: Float[Tensor, "b s d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        """Normalised rows -> code, and the pre-activations that it came from where they exist as a whole."""
        h = self.preactivation(x)
        return self.activate(h), h

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        target, _ = self.normalizer(self.rows(x))
        code, h = self.response(target)
        if self.training:
            self.observe(code)
        return self.output(target, code, h)

    def output(self, target: Float[Tensor, "b s d"], code: Code, h: Float[Tensor, "b f"] | None) -> SAEOutput:
        """What `forward` gives, decoded."""
        return SAEOutput(target, self.decode(code), code, h)

    @torch.no_grad()
    def observe(self, code: Code) -> None:
        """Update the state that training keeps, from the code of one training batch."""
        self.batches_since_fired.add_(1).masked_fill_(fired(code), 0)

    def dead(self) -> Bool[Tensor, " f"]:
        return self.batches_since_fired >= self.dead_after

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        terms = {"reconstruction": self.reconstruction(out)}
        if self.auxk_coefficient:
            terms["auxk"] = self.auxk_coefficient * self.auxk(out)
        return terms

    def reconstruction(self, out: SAEOutput) -> Tensor:
        """The reconstruction loss."""
        return losses.mse(out.target, out.x_hat)

    def auxk(self, out: SAEOutput) -> Tensor:
        """The auxiliary loss, unweighted; it reaches the dead latents' rows of W_enc, b_enc, W_dec and nothing else."""
        dead = self.dead().nonzero().squeeze(-1)
        if len(dead) == 0:
            return out.x_hat.new_zeros(())
        x, residual = ((out.target - y).detach().flatten(1) for y in (self.b_dec, out.x_hat))
        W_enc, W_dec = (W.flatten(1).index_select(0, dead) for W in (self.W_enc, self.W_dec))
        b_enc = None if self.b_enc is None else self.b_enc[dead]
        return auxk(x, residual, W_enc, b_enc, W_dec, self.k_aux or x.shape[1] // 2)

    def encode(self, x: Tensor) -> Float[Tensor, "b f"]:
        """Raw activations -> code, always as a dense matrix: for users, who index it, plot it and edit it.

        Training and evaluation go through `forward` and `autoencode`, which keep a sparse code sparse.
        """
        target, _ = self.normalizer(self.rows(x))
        code = self.code(target)
        return code.to_dense() if isinstance(code, SparseCode) else code

    def decode(self, code: Code, context: Context | None = None) -> Float[Tensor, "b s d"]:
        """x_hat, normalised; in raw units where the `context` of the rows' normalisation is given."""
        x_hat = sparse.decode(code, self.W_dec, self.b_dec)
        return x_hat if context is None else self.normalizer.undo(x_hat, context)

    def autoencode(self, x: Tensor) -> tuple[Tensor, Code]:
        target, context = self.normalizer(self.rows(x))
        code = self.code(target)
        return self.decode(code, context).view_as(x).to(x.dtype), code

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove from each latent's decoder gradient the part parallel to the latent: g - (g·u) u, u = W_dec_i."""
        if self.W_dec.grad is not None:
            size = max(1, 2**21 // self.W_dec[0].numel())  # what a CPU's cache keeps from one operation to the next
            for g, u in zip(self.W_dec.grad.flatten(1).split(size), self.W_dec.flatten(1).split(size), strict=True):
                # Rows are divided by their norm after every step, so |u| is 1 to rounding; |u|² makes it exact.
                parallel = (g * u).sum(-1, keepdim=True) / u.norm(dim=-1, keepdim=True).square()
                g.addcmul_(u, parallel, value=-1)

    def after_step(self) -> None:
        self.normalize_decoder()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Put every row of W_dec back on the unit sphere over (s, d)."""
        rows = self.W_dec.flatten(1)
        rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))


class SparseLinearSAE(LinearSAE):
    """A LinearSAE whose codes are sparse while it trains: h exists in pieces only, and a subclass says what is kept.

    After the encoder's product everything, gradients included, is done by active entry (see sparse.py).
    """

    @abstractmethod
    def select(self, h: Pieces) -> SparseCode:
        """Pre-activations, in pieces of rows -> code, by a rule of selection.py. Needs no gradient."""

    def response(self, x: Float[Tensor, "b s d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        with torch.no_grad():
            code = self.select(Preactivations((x - self.b_dec).flatten(1), self.W_enc.flatten(1), self.b_enc))
        return encoded(code, x, self.b_dec, self.W_enc, self.b_enc), None

    def activate(self, h: Float[Tensor, "b f"]) -> SparseCode:
        with torch.no_grad():
            pattern = self.select([h.detach()]).pattern
        return SparseCode(pattern, h[pattern.rows, pattern.latents])


class PenalizedLinearSAE(LinearSAE):
    """A LinearSAE that is sparse because its loss says so: with h whole, its bias, and a penalty that warms up.

    Rows of W_dec have unit norm, so a penalty that others weigh by them (z_i |W_dec_i|) is the plain one here.

    Args:
        sparsity_warmup: training batches over which the penalty's coefficient rises linearly to its full size; 0
            starts with that. Dead latents come from a penalty that acts before there is a reconstruction.
    """

    steps: Tensor
    """Training batches seen."""

    def __init__(self, sparsity_warmup: int = 0, encoder_bias: bool = True, **linear: Any):
        super().__init__(encoder_bias=encoder_bias, **linear)
        self.sparsity_warmup = sparsity_warmup
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def observe(self, code: Code) -> None:
        super().observe(code)
        self.steps += 1

    def warmed(self, penalty: Tensor) -> Tensor:
        """The penalty as much as this batch, the `steps`-th, may feel of it."""
        return penalty * (self.steps / self.sparsity_warmup).clamp_max(1) if self.sparsity_warmup else penalty


def checked_k(k: float, n_latents: int) -> float:
    """k, if a dictionary of n_latents can have that many active latents.

    Raises:
        UserError: it cannot.
    """
    if not 1 <= k <= n_latents:
        raise UserError(
            f"k={k} must lie between 1 and the dictionary's {n_latents} latents: lower k or raise expansion."
        )
    return k
