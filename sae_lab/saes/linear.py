"""The maths that all SAEs with a linear encoder and a linear decoder share."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab import losses, sparse
from sae_lab.auxk import auxk
from sae_lab.errors import UserError
from sae_lab.matmul import linear
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.mlp import MLP, checked_widths
from sae_lab.saes.normalize import Context, normalizer
from sae_lab.saes.resample import SCALE, directions
from sae_lab.selection import Pieces, Preactivations
from sae_lab.sparse import Code, SparseCode, encoded, fired


class Encoder(NamedTuple):
    """h = (inputs - origin) Wᵀ [+ b_enc], with inputs and W flattened from their second axis on."""

    inputs: Float[Tensor, "b s n"]
    origin: Float[Tensor, "s n"]
    W: Float[Tensor, "f s n"]


class LinearSAE(BaseSAE):
    """h = (x - b_dec) W_encᵀ [+ b_enc] [+ MLP],   z = activate(h),   x_hat = z W_dec + b_dec

    loss = mean (x - x_hat)² + aux

    x is the normalised input. Sums over inputs run over sources and dimensions together, so with s > 1 this is a
    crosscoder. Each row of W_dec has unit norm over (s, d); the part of its gradient that would change the norm is
    removed. A latent that has not fired in `dead_after` training batches is dead: the auxiliary loss gives the dead
    the residual to explain (see auxk.py).

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        seed: of the initial weights, drawn by a generator of this SAE's own.
        normalize: `per_token` or `none` (see saes/normalize.py).
        encoder_bias: whether h has b_enc.
        hidden: the widths of the hidden layers of an MLP that adds to h (see saes/mlp.py); empty for none.
        tied: whether W_enc and W_dec are one parameter: both have unit rows, and their gradients add up. A saved SAE
            holds the two of them, equal, so that a reader need not know.
        frozen_decoder: whether W_dec and b_dec stand still, with whatever norms they have: training learns an encoder
            for a given dictionary (`start_from` gives it).
        auxk_coefficient: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents may explain one row's residual; None is s·d / 2, after Gao et al. 2024, §A.2.
        auxk_selection: whether those are the top k_aux of each `row` or, as the write-up of BatchTopK suggests, the
            top k_aux · b of the `batch`.
        dead_after: batches without firing after which a latent is dead.

    Raises:
        UserError: an unknown word, a hidden layer without units, or a decoder both tied and frozen.
    """

    batches_since_fired: Tensor
    steps: Tensor
    """Training batches seen."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        n_sources: int = 1,
        seed: int = 0,
        normalize: str = "per_token",
        encoder_bias: bool = False,
        hidden: Sequence[int] = (),
        tied: bool = False,
        frozen_decoder: bool = False,
        auxk_coefficient: float = 0.0,
        k_aux: int | None = None,
        auxk_selection: str = "row",
        dead_after: int = 5,
    ):
        super().__init__()
        self.d_in, self.n_latents, self.n_sources, self.seed = d_in, n_latents, n_sources, seed
        self.normalize, self.encoder_bias, self.hidden = normalize, encoder_bias, checked_widths(hidden)
        self.tied, self.frozen_decoder = tied, frozen_decoder
        if tied and frozen_decoder:
            raise UserError("tied=true with frozen_decoder=true leaves nothing to train: choose one of them.")
        self.auxk_coefficient, self.k_aux, self.dead_after = auxk_coefficient, k_aux, dead_after
        self.auxk_selection = checked_word("auxk_selection", auxk_selection, "row", "batch")
        self.normalizer = normalizer(normalize)
        self.W_enc = nn.Parameter(torch.empty(n_latents, n_sources, d_in))
        self.W_dec = (
            self.W_enc if tied else nn.Parameter(torch.empty_like(self.W_enc), requires_grad=not frozen_decoder)
        )
        self.b_dec = nn.Parameter(torch.zeros(n_sources, d_in), requires_grad=not frozen_decoder)
        self.b_enc = nn.Parameter(torch.zeros(n_latents)) if encoder_bias else None
        self.mlp = MLP(n_sources * d_in, self.hidden, n_latents) if self.hidden else None
        self.register_buffer("batches_since_fired", torch.zeros(n_latents, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """The write-up's: W_enc uniform in ±sqrt(6 / f) (Kaiming), W_dec its rows at unit norm, biases zero."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = math.sqrt(6 / self.n_latents)
        self.W_enc.uniform_(-bound, bound, generator=generator)
        self.W_dec.copy_(self.W_enc)
        self.normalize_decoder()
        if self.mlp is not None:
            self.mlp.initialize(generator)

    def start_from(self, other: BaseSAE) -> None:
        theirs = other.config.get("normalize")
        if theirs != self.normalize:
            raise UserError(
                f"the parameters of an SAE with normalize={theirs} want sae.normalize={theirs} here as well."
            )
        if self.tied and not other.config.get("tied"):
            raise UserError(
                "an SAE with tied=true cannot start from one whose W_enc and W_dec differ: give tied=false."
            )
        super().start_from(other)

    @abstractmethod
    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        """Pre-activations -> code: what tells the architectures apart."""

    def encoder(self, x: Float[Tensor, "b s d"]) -> Encoder:
        """What h is the product of; an MLP's last layer joins the linear encoder in that one product."""
        if self.mlp is None:
            return Encoder(x, self.b_dec, self.W_enc)
        centred = (x - self.b_dec).flatten(1)
        inputs = torch.cat([centred, self.mlp(centred)], dim=1).unsqueeze(1)
        W = torch.cat([self.W_enc.flatten(1), self.mlp.W_out], dim=1).unsqueeze(1)
        return Encoder(inputs, torch.zeros_like(inputs[0]), W)

    def preactivation(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b f"]:
        """h, from normalised rows."""
        inputs, origin, W = self.encoder(x)
        return linear((inputs - origin).flatten(1), W.flatten(1), self.b_enc)

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
        self.steps += 1

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
        """The auxiliary loss, unweighted; it reaches the dead latents' rows of encoder and decoder, nothing else."""
        dead = self.dead().nonzero().squeeze(-1)
        if len(dead) == 0:
            return out.x_hat.new_zeros(())
        inputs, origin, W = self.encoder(out.target)
        x, residual = (inputs - origin).detach().flatten(1), (out.target - out.x_hat).detach().flatten(1)
        W_enc, W_dec = (V.flatten(1).index_select(0, dead) for V in (W, self.W_dec))
        b_enc = None if self.b_enc is None else self.b_enc[dead]
        k_aux = self.k_aux or self.n_sources * self.d_in // 2
        return auxk(x, residual, W_enc, b_enc, W_dec, k_aux, over_batch=self.auxk_selection == "batch")

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
            # On a CPU as much as its cache keeps from one operation to the next; a GPU wants few operations.
            size = max(1, (2**26 if self.W_dec.is_cuda else 2**21) // self.W_dec[0].numel())
            for g, u in zip(self.W_dec.grad.flatten(1).split(size), self.W_dec.flatten(1).split(size), strict=True):
                # Rows are divided by their norm after every step, so |u| is 1 to rounding; |u|² makes it exact.
                parallel = (g * u).sum(-1, keepdim=True) / u.norm(dim=-1, keepdim=True).square()
                g.addcmul_(u, parallel, value=-1)

    def after_step(self) -> None:
        if not self.frozen_decoder:
            self.normalize_decoder()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Put every row of W_dec back on the unit sphere over (s, d)."""
        rows = self.W_dec.flatten(1)
        rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))


class SparseLinearSAE(LinearSAE):
    """A LinearSAE whose codes are sparse while it trains: h exists in pieces only, and a subclass says what is kept.

    After the encoder's product everything, gradients included, is done by active entry (see sparse.py).

    Args:
        k: the number of active latents a row, or its mean where the rule is one over the batch.
        k_warmup: training batches over which k falls linearly from k_start; 0 trains with k at once. Latents that are
            wanted at first, when many are, have a direction to go in when few are.
        k_start: the first batch's k; None is s·d, or f if that is less.

    Raises:
        UserError: k or k_start is not between 1 and the size of the dictionary.
    """

    def __init__(
        self,
        k: float,
        k_warmup: int = 0,
        k_start: float | None = None,
        auxk_coefficient: float = 1 / 32,
        **linear: Any,
    ):
        super().__init__(auxk_coefficient=auxk_coefficient, **linear)
        self.k, self.k_warmup, self.k_start = checked_k(k, self.n_latents), k_warmup, k_start
        self._k_start = min(self.n_sources * self.d_in, self.n_latents) if k_start is None else k_start
        checked_k(self._k_start, self.n_latents, "k_start")

    @property
    def current_k(self) -> float:
        """k as this batch, the `steps`-th, may use it; in `eval()` the k that training ends with."""
        if not (self.training and self.k_warmup):
            return self.k
        return self.k + (self._k_start - self.k) * max(0.0, 1 - int(self.steps) / self.k_warmup)

    @abstractmethod
    def select(self, h: Pieces) -> SparseCode:
        """Pre-activations, in pieces of rows -> code, by a rule of selection.py. Needs no gradient."""

    def response(self, x: Float[Tensor, "b s d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        inputs, origin, W = self.encoder(x)
        with torch.no_grad():
            code = self.select(Preactivations((inputs - origin).flatten(1), W.flatten(1), self.b_enc))
        return encoded(code, inputs, origin, W, self.b_enc), None

    def activate(self, h: Float[Tensor, "b f"]) -> SparseCode:
        with torch.no_grad():
            pattern = self.select([h.detach()]).pattern
        return SparseCode(pattern, h[pattern.rows, pattern.latents])


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
        UserError: resample_every with a decoder that is frozen.
    """

    def __init__(self, sparsity_warmup: int = 0, resample_every: int = 0, encoder_bias: bool = True, **linear: Any):
        super().__init__(encoder_bias=encoder_bias, **linear)
        self.sparsity_warmup, self.resample_every = sparsity_warmup, resample_every
        if resample_every and self.frozen_decoder:
            raise UserError(
                "resample_every rewrites the decoder, which frozen_decoder=true forbids: choose one of them."
            )

    @torch.no_grad()
    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        if not self.resample_every or (step := int(self.steps)) == 0 or step % self.resample_every:
            return []
        dead, alive = self.dead().nonzero().squeeze(-1)[: len(x)], ~self.dead()
        if len(dead) == 0 or not alive.any():
            return []
        target, _ = self.normalizer(self.rows(x))
        x_hat = self.decode(self.code(target))
        v = directions(target, x_hat, self.b_dec, len(dead), seed=self.seed * 1_000_003 + step)
        self.W_enc[dead] = SCALE * self.W_enc[alive].flatten(1).norm(dim=1).mean() * v
        self.W_dec[dead] = v
        for parameter, value in self.fresh():
            parameter[dead] = value
        self.batches_since_fired[dead] = 0
        return [(parameter, dead) for parameter in (self.W_enc, self.W_dec, *(p for p, _ in self.fresh()))]

    def fresh(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters that a latent has beside its encoder and decoder, and what a resampled one starts with."""
        fresh = [] if self.b_enc is None else [(self.b_enc, 0.0)]
        return fresh if self.mlp is None else [*fresh, (self.mlp.W_out, 0.0)]

    def warmed(self, penalty: Tensor) -> Tensor:
        """The penalty as much as this batch, the `steps`-th, may feel of it."""
        return penalty * (self.steps / self.sparsity_warmup).clamp_max(1) if self.sparsity_warmup else penalty


def checked_word(name: str, word: str, *known: str) -> str:
    """`word`, the value of the setting `name`, if it is one of those known.

    Raises:
        UserError: it is not.
    """
    if word not in known:
        raise UserError(f"sae.{name}={word} is not known: choose one of {', '.join(known)}.")
    return word


def checked_k(k: float, n_latents: int, name: str = "k") -> float:
    """k, if a dictionary of n_latents can have that many active latents.

    Raises:
        UserError: it cannot.
    """
    if not 1 <= k <= n_latents:
        raise UserError(
            f"{name}={k} must lie between 1 and the dictionary's {n_latents} latents: lower {name} or raise expansion."
        )
    return k
