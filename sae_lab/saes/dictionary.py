"""Base class of all SAEs with a linear decoder, with or without an encoder."""

import math
from abc import abstractmethod
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab.ops import losses, sparse
from sae_lab.ops.matmul import linear
from sae_lab.ops.sparse import Code, SparseCode, fired_latents
from sae_lab.ops.unit_norm import divide_by_norm, project_gradient
from sae_lab.parallel.collectives import concatenate_ranks, on_any_rank
from sae_lab.parallel.shards import own_share
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.memory import check_memory_of
from sae_lab.runtime.seeds import uniform_rows
from sae_lab.saes.base import BaseSAE, Edit, SAEOutput
from sae_lab.saes.parts.normalize import Context, Normalization
from sae_lab.saes.parts.sources import Sources
from sae_lab.saes.parts.starts import B_DEC

TOO_MANY_LATENTS = "the decoder of that many latents takes {size}: lower n_latents or expansion."


class DictionarySAE(BaseSAE):
    """SAE with a linear decoder; a subclass defines the code z.

        x_hat = z W_dec + b_dec [+ x W_skip]
        loss  = mean (x - x_hat)²

    x is the normalized input. Sums over inputs run over sources and dimensions together, so with s > 1 this is a
    crosscoder. Each row of W_dec has unit norm over (s, d), and the part of its gradient that would change the norm is
    removed. How the norm of a row is divided among the sources is learned, and shows to which of them the latent
    belongs. A latent that has not fired in `dead_after` training batches is dead.

    A transcoder reads the first sources of a row, x, and predicts the others, y:

        z     = activate(x W_encᵀ [+ b_enc])
        y_hat = z W_dec + b_dec [+ x W_skip]
        loss  = mean (y - y_hat)² + aux

    If x is the input of an MLP and y its output, the latents describe what the MLP computes, and the weights alone show
    what activates them. With sae.n_inputs=1 and two sites, any SAE with a linear encoder is a transcoder: Dunefsky,
    Chlenski, Nanda 2024, arXiv 2406.11944. The skip connection learns the part of y that is linear in x: Paulo,
    Shabalin, Belrose 2025, arXiv 2501.18823.

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        n_inputs: the first n_inputs sources are only read, and x_hat predicts the others. 0: every source is read and
            predicted.
        normalize: a key of NORMALIZERS (see parts/normalize.py).
        skip: whether the x_hat of a transcoder includes x W_skip, which starts at zero.
        seed: seed of the initial weights, which are drawn by a separate generator.
        dead_after: training batches without firing after which a latent is dead.
        decoder_norm: which norm of W_dec_i is one: `joint` is (sum_s |W_dec_i,s|²)^½, `sum` is sum_s |W_dec_i,s|. They
            are equal if s is 1. The norm is the unit of z_i, so it decides what selection, thresholds and penalties
            compare: if it is one, z_i equals z_i · norm_i. Published crosscoders weight latents by the sum. With
            `joint`, a latent of a single source counts for up to sqrt(s) times more than a shared one.
        b_dec_init: b_dec at the start: `zeros`; `mean` or `geometric_median`: that of the first training batch, over
            the rows of all ranks, each source by itself, in the units of x_hat (see parts/starts.py).

    Raises:
        UserError: a setting is unknown or out of range, no source is left to predict, `normalize` would need the row
            that a transcoder predicts, or `skip` is used without `n_inputs`.
    """

    batches_since_fired: Tensor
    steps: Tensor
    """Training batches seen."""

    def __init__(
        self,
        d_in: Annotated[int, Ge(1)],
        n_latents: Annotated[int, Ge(1)],
        n_sources: Annotated[int, Ge(1)] = 1,
        n_inputs: Annotated[int, Ge(0)] = 0,
        normalize: Normalization = "per_token",
        skip: bool = False,
        seed: Annotated[int, Ge(0)] = 0,
        dead_after: Annotated[int, Ge(1)] = 5,
        decoder_norm: Literal["joint", "sum"] = "joint",
        b_dec_init: Literal["zeros", "mean", "geometric_median"] = "zeros",
    ):
        super().__init__()
        if skip and not n_inputs:
            raise SettingError(
                "{skip}=true is only for transcoders, since an SAE's input would bypass the latents: give {skip}=false "
                "or {n_inputs}=1."
            )
        self.d_in, self.n_latents, self.n_sources, self.n_inputs = d_in, n_latents, n_sources, n_inputs
        self.normalize, self.skip, self.seed = normalize, skip, seed
        self.dead_after, self.decoder_norm, self.b_dec_init = dead_after, decoder_norm, b_dec_init
        self._has_start = b_dec_init == "zeros"
        self.sources = Sources(d_in, n_sources, n_inputs, normalize)
        n_read, n_written = self.sources.n_read, self.sources.n_written
        self._own_latents = own_share(type(self).__name__, n_latents, "shardable" in vars(type(self)))
        check_memory_of(torch.get_default_device(), 4 * len(self.own_latents) * n_written * d_in, TOO_MANY_LATENTS)
        self.W_dec = nn.Parameter(self.draw_weights(n_written, torch.Generator().manual_seed(seed)))
        divide_by_norm(self.W_dec, decoder_norm)
        self.b_dec = nn.Parameter(torch.zeros(n_written, d_in))
        self.W_skip = nn.Parameter(torch.zeros(n_written * d_in, n_read * d_in)) if skip else None
        self.register_buffer("batches_since_fired", torch.zeros(len(self.own_latents), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def own_latents(self) -> range:
        return self._own_latents

    def latent_axes(self) -> dict[str, int]:
        return {"W_dec": 0, "batches_since_fired": 0}

    def draw_weights(self, n: int, generator: torch.Generator) -> Float[Tensor, "f n d"]:
        """Draw the write-up's initial weights for n sources: uniform in ±sqrt(6 / f) (Kaiming)."""
        bound = math.sqrt(6 / self.n_latents)
        return uniform_rows(self.n_latents, self.own_latents, (n, self.d_in), bound, generator)

    @abstractmethod
    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        """Map normalized rows to (code, pre-activations); the latter are None if they are never held as a whole."""

    def read(self, x: Tensor) -> tuple[Float[Tensor, "b r d"], Context]:
        """Normalize the sources to read, and return the context that gives x_hat its raw units.

        Args:
            x: raw activations, of all sources or of a transcoder's inputs alone.
        """
        return self.sources.read(self.as_rows(x, self.sources.n_sources_given(x)))

    def code(self, x: Float[Tensor, "b r d"]) -> Code:
        """Map normalized rows to a code, in the form (sparse or dense) that training and evaluation use."""
        return self.encode_normalized(x)[0]

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        rows = self.as_rows(x)
        if self.training:
            self.start(rows)
        read, target = self.sources(rows)
        code, h = self.encode_normalized(read)
        if self.training:
            self.observe(code)
        return self.output(read, target, code, h)

    def start(self, x: Float[Tensor, "b s d"]) -> None:
        rows = self.as_rows(x)
        self.sources.observe(rows)
        if not self.has_start:
            self.start_biases(*self.sources(rows))

    @property
    def has_start(self) -> bool:
        """Whether no bias waits for the first batch. Reads `steps` only until then, since reading waits for the GPU."""
        self._has_start = self._has_start or bool(self.steps > 0)
        return self._has_start

    @torch.no_grad()
    def start_biases(self, read: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"]) -> None:
        """Set the biases that start at a statistic of the first training batch, over the rows of all ranks."""
        with torch.autocast(read.device.type, enabled=False):
            self.set_biases(concatenate_ranks(read)[0], concatenate_ranks(target)[0])
        self._has_start = True

    def set_biases(self, read: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"]) -> None:
        """Set the biases by the normalized rows of a batch."""
        if self.b_dec_init != "zeros":
            self.b_dec.copy_(B_DEC[self.b_dec_init](target))

    def start_from(self, other: BaseSAE) -> None:
        super().start_from(other)
        self._has_start = self._has_start or getattr(other, "has_start", True)

    def restart(self) -> None:
        self.steps.zero_()

    def output(
        self, x: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"], code: Code, h: Float[Tensor, "b f"] | None
    ) -> SAEOutput:
        """Decode, and return the output of `forward`."""
        return SAEOutput(x, target, self.decode_normalized(code, x), code, h)

    def decode_normalized(self, code: Code, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b w d"]:
        """Map the code of the rows x to normalized x_hat."""
        return sparse.decode(code, self.W_dec, self.decoder_offset(x))

    def decoder_offset(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "w d"] | Float[Tensor, "b w d"]:
        """Return x_hat without active latents: b_dec [+ x W_skip]."""
        if self.W_skip is None:
            return self.b_dec
        return self.b_dec + linear(x.flatten(1), self.W_skip).unflatten(1, self.b_dec.shape)

    @torch.no_grad()
    def observe(self, code: Code) -> None:
        """Update counters and thresholds from the code of one training batch."""
        self.batches_since_fired.add_(1).masked_fill_(on_any_rank(fired_latents(code)), 0)
        self.steps += 1

    def dead(self) -> Bool[Tensor, " f"]:
        return self.batches_since_fired >= self.dead_after

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        return {"reconstruction": self.reconstruction(out)}

    def reconstruction(self, out: SAEOutput) -> Tensor:
        """Compute the reconstruction loss."""
        return losses.mse(out.target, out.x_hat)

    def encode(self, x: Tensor) -> Float[Tensor, "*b f"]:
        """Map raw activations, of all sources or of a transcoder's inputs alone, to a dense code.

        The dense code is easy to index, plot and edit. Training and evaluation use `forward` and `autoencode`, which
        keep a sparse code sparse.
        """
        code = self.code(self.read(x)[0])
        dense = code.to_dense() if isinstance(code, SparseCode) else code
        return dense.view(*self.leading(x, self.sources.n_sources_given(x)), code.shape[1])

    def decode_rows(self, code: Code) -> Float[Tensor, "b w d"]:
        return self.sources.undo_shared(sparse.decode(code, self.W_dec, self.b_dec))

    def predict(self, x: Tensor, edit: Edit | None = None) -> Float[Tensor, "*b w d"]:
        """Map raw activations to x_hat in raw units. A transcoder predicts its other sources from its inputs."""
        y = self._predict(x, edit)[0].to(x.dtype)
        return y.view(*self.leading(x, self.sources.n_sources_given(x)), *y.shape[1:])

    def _predict(self, x: Tensor, edit: Edit | None) -> tuple[Float[Tensor, "b w d"], Code]:
        read, context = self.read(x)
        code = self.code(read)
        if edit is not None:
            code = edit(code.to_dense() if isinstance(code, SparseCode) else code)
        return self.sources.undo(self.decode_normalized(code, read), context), code

    def autoencode(self, x: Tensor, edit: Edit | None = None) -> tuple[Tensor, Code]:
        rows = self.as_rows(x)
        x_hat, code = self._predict(rows, edit)
        whole = torch.cat([rows[:, : self.n_inputs], x_hat], dim=1) if self.n_inputs else x_hat
        return whole.view_as(x).to(x.dtype), code

    def predicted_mask(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        return self.sources.predicted_mask(x)

    def directions(self) -> Float[Tensor, "f w d"]:
        return self.sources.unwhiten(self.W_dec.detach())

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            project_gradient(self.W_dec.grad, self.W_dec, self.decoder_norm)

    def after_step(self) -> None:
        if not getattr(self.W_dec, "factors", None):  # else RowAdam has divided its rows
            divide_by_norm(self.W_dec, self.decoder_norm)
