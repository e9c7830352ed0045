"""Base class of all SAEs with a linear encoder and a linear decoder."""

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.ops.auxk import auxk_loss
from sae_lab.ops.fixed_size import is_fixed_size, true_positions_padded
from sae_lab.ops.matmul import linear_by_part
from sae_lab.ops.row_gradients import select_rows
from sae_lab.ops.sparse import Code
from sae_lab.ops.unit_norm import divide_by_norm
from sae_lab.parallel.mesh import latent_axis
from sae_lab.parallel.shards import count_over_shards, max_over_shards, on_any_shard, shared_by_shards
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.dictionary import DictionarySAE
from sae_lab.saes.parts.layers import OneLayer
from sae_lab.saes.parts.mlp import MLP
from sae_lab.saes.parts.starts import level_exceeded_by

Widths = Annotated[
    Sequence[Annotated[int, Ge(1)]],
    ErrorMessage("must be a list of positive widths: [512], or [] for no MLP"),
]
"""Widths of the hidden layers of an MLP."""


class Encoder(NamedTuple):
    """Factors of h = (inputs - center) Wᵀ [+ b_enc], with inputs and W flattened from their second axis on."""

    inputs: Float[Tensor, "b r n"]
    center: Float[Tensor, "r n"]
    W: Float[Tensor, "f _ n"]


class LinearSAE(DictionarySAE):
    """SAE with a linear encoder and a linear decoder; a subclass defines `activate`.

        h     = (x - b_dec) W_encᵀ [+ b_enc] [+ MLP]
        z     = activate(h)
        x_hat = z W_dec + b_dec
        loss  = mean (x - x_hat)² + aux

    W_enc starts as W_dec, with rows of the norm that `encoder_norm` gives. A transcoder does not subtract b_dec from x,
    because b_dec belongs to other sources, and its W_enc is drawn independently of W_dec. In the auxiliary loss, dead
    latents reconstruct the residual (see ops/auxk.py).

    Args:
        encoder_bias: whether h includes b_enc.
        encoder_norm: norm of each latent's row of W_enc, over all sources that it reads, at the start. `drawn`: as
            drawn, sqrt(2 r d / f) with a relative spread of sqrt(0.2 / (r d)) (see `draw_weights`); `unit`: 1, so that
            W_enc starts equal to W_dec of an SAE; a number: that norm.
        b_enc_init: b_enc at the start: `zeros`; a number below 1: each latent may be active on that share of the first
            training batch, over the rows of all ranks (Anthropic, January 2025, who choose 10,000 / f).
        hidden: widths of the hidden layers of an MLP that is added to h (see parts/mlp.py); empty: no MLP.
        tied: whether W_enc and W_dec are one parameter, with unit rows and the sum of both gradients. A saved SAE holds
            both of them, equal, so that it can be read like any other.
        frozen_decoder: whether W_dec and b_dec are not trained and keep the norms that they have. Training then learns
            an encoder for a given dictionary, which `start_from` copies.
        unit_norm: whether the rows of W_dec keep norm one. False leaves their norms free after the start, as
            Anthropic's update of April 2024 and SAELens do. A penalty on z is then one on z_i |W_dec_i|, so a latent
            gains nothing from a small z with a long row. Selection and thresholds still compare z alone.
        auxk_coefficient: weight of the auxiliary loss; 0: no auxiliary loss.
        k_aux: maximum number of dead latents that explain the residual of a row; None: half the length of the residual,
            s·d / 2 (Gao et al. 2024, §A.2).
        auxk_selection: `row` selects the top k_aux dead latents of each row; `batch` the top k_aux · b of the whole
            batch, as the BatchTopK write-up suggests.

    Raises:
        UserError: a setting is unknown or out of range, or `tied` is used with `frozen_decoder`, with an `encoder_norm`
            other than that of W_dec, or in a transcoder.
    """

    def __init__(
        self,
        encoder_bias: bool = False,
        encoder_norm: Annotated[float, Gt(0)] | Literal["drawn", "unit"] = "drawn",
        b_enc_init: Annotated[float, Gt(0), Lt(1)] | Literal["zeros"] = "zeros",
        hidden: Widths = (),
        tied: bool = False,
        frozen_decoder: bool = False,
        unit_norm: bool = True,
        auxk_coefficient: Annotated[float, Ge(0)] = 0.0,
        k_aux: Annotated[int, Ge(1)] | None = None,
        auxk_selection: Literal["row", "batch"] = "row",
        **dictionary: Any,
    ):
        super().__init__(**dictionary)
        check_tied(tied, frozen_decoder, encoder_norm, self.n_inputs)
        check_starts(encoder_bias, b_enc_init, frozen_decoder, self.b_dec_init)
        self.encoder_bias, self.hidden, self.tied, self.frozen_decoder = encoder_bias, [*hidden], tied, frozen_decoder
        self.encoder_norm, self.b_enc_init, self.unit_norm = encoder_norm, b_enc_init, unit_norm
        self._has_start = self._has_start and b_enc_init == "zeros"
        self.auxk_coefficient, self.k_aux, self.auxk_selection = auxk_coefficient, k_aux, auxk_selection
        for parameter in (self.W_dec, self.b_dec):
            parameter.requires_grad_(not frozen_decoder)
        self.dead_slots = 0
        self.layers = self.build_layers()
        generator = torch.Generator().manual_seed(self.seed)
        W_enc = self.draw_weights(self.sources.n_written, generator)  # the same numbers as W_dec, from the same seed
        if self.n_inputs:
            W_enc = self.draw_weights(self.sources.n_read // self.layers.n_layers, generator)
        if encoder_norm != "drawn":
            divide_by_norm(W_enc, "joint")
            W_enc *= 1.0 if encoder_norm == "unit" else encoder_norm
        self.W_enc = self.W_dec if tied else nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(torch.zeros(len(self.own_latents))) if encoder_bias else None
        self.mlp = MLP(self.sources.n_read * self.d_in, self.hidden, len(self.own_latents)) if self.hidden else None
        if self.mlp is not None:
            self.mlp.initialize(generator)

    def latent_axes(self) -> dict[str, int]:
        axes = super().latent_axes() | {"W_enc": 0}
        axes |= {} if self.b_enc is None else {"b_enc": 0}
        return axes if self.mlp is None else axes | {"mlp.W_out": 0}

    def build_layers(self) -> OneLayer:
        """Build the part that defines which sources each latent reads and writes."""
        return OneLayer()

    def start_from(self, other: BaseSAE) -> None:
        if self.tied and not other.config.get("tied"):
            raise UserError(
                "an SAE with tied=true cannot start from an SAE with different W_enc and W_dec: give tied=false."
            )
        super().start_from(other)

    def set_biases(self, read: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"]) -> None:
        super().set_biases(read, target)
        if self.b_enc is not None and self.b_enc_init != "zeros":
            inputs, center, W = self.encoder(read)
            rows = self.layers.encoder_rows(W, torch.arange(len(W), device=W.device))
            level = level_exceeded_by(self.b_enc_init, (inputs - center).flatten(1), rows)
            self.b_enc.copy_(self.firing_level() - level)

    def firing_level(self) -> Float[Tensor, " f"] | float:
        """Return what h must exceed for a latent to be active, whatever the others do."""
        return 0.0

    @abstractmethod
    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        """Map pre-activations to a code. This is where the architectures differ."""

    def encoder(self, x: Float[Tensor, "b r d"]) -> Encoder:
        """Return the factors of h. The last layer of an MLP and the linear encoder are concatenated to one product."""
        x, center = (self.layers.own_sources(t) for t in (x, self.encoder_center()))
        if self.mlp is None:
            return Encoder(shared_by_shards(x), shared_by_shards(center), self.W_enc)
        centered = (x - center).flatten(1)
        inputs = shared_by_shards(torch.cat([centered, self.mlp(centered)], dim=1).unsqueeze(1))
        W = torch.cat([self.W_enc.flatten(1), self.mlp.W_out], dim=1).unsqueeze(1)
        return Encoder(inputs, torch.zeros_like(inputs[0]), W)

    def reading_directions(self) -> Float[Tensor, "f r d"] | None:
        return self.W_enc.detach() if self.mlp is None else None

    def encoder_center(self) -> Float[Tensor, "r d"]:
        """Return what is subtracted from x before encoding: b_dec, or 0 for a transcoder."""
        return self.b_dec.new_zeros(self.sources.n_read, self.d_in) if self.n_inputs else self.b_dec

    def pre_activations(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b f"]:
        """Compute h from normalized rows."""
        inputs, center, W = self.encoder(x)
        return linear_by_part((inputs - center).flatten(1), W.flatten(1), self.b_enc, self.layers.sizes)

    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        h = self.pre_activations(x)
        return self.activate(h), h

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        terms = super().losses(out)
        if self.auxk_coefficient:
            terms["auxk"] = self.auxk_coefficient * self.auxk_loss(out)
        return terms

    @property
    def most_explaining(self) -> int:
        """The maximum number of dead latents that explain the residual of a row."""
        return self.k_aux or max(1, self.sources.n_written * self.d_in // 2)

    def auxk_loss(self, out: SAEOutput) -> Tensor:
        """Compute the unweighted auxiliary loss. Only the encoder and decoder rows of dead latents get gradients."""
        # In fixed-size mode, f stands for no latent: its rows are zero, so that it is never selected.
        f = len(self.own_latents)
        if is_fixed_size() and not self.dead_slots:
            return out.x_hat.new_zeros(())
        dead = true_positions_padded(self.dead(), self.dead_slots) if is_fixed_size() else self.dead().nonzero()[:, 0]
        n_dead = latent_axis().size * len(dead) if is_fixed_size() else count_over_shards(len(dead), dead.device)
        if n_dead == 0:
            return out.x_hat.new_zeros(())
        dead = dead if len(dead) else dead.new_full((1,), f)  # none of this shard
        inputs, center, W = self.encoder(out.x)
        x, residual = (inputs - center).detach().flatten(1), (out.target - out.x_hat).detach().flatten(1)
        W_enc, W_dec = self.layers.encoder_rows(W, dead), select_rows(self.W_dec.flatten(1), dead, self.W_dec)
        b_enc = None if self.b_enc is None else F.pad(self.b_enc, (0, 1)).index_select(0, dead)
        k_aux, over_batch = min(n_dead, self.most_explaining), self.auxk_selection == "batch"
        loss = auxk_loss(x, residual, W_enc, b_enc, W_dec, k_aux, over_batch, self.signed)
        return loss * on_any_shard(dead[0] < f)

    def foresee(self, ahead: int) -> dict[str, Tensor]:
        if not self.auxk_coefficient:
            return super().foresee(ahead)
        # A step adds at most one to each counter, and its losses see the counters after its own batch.
        may_be_dead = self.batches_since_fired >= self.dead_after - 1 - ahead
        return super().foresee(ahead) | {"most_dead": max_over_shards(may_be_dead.sum())}

    def plan_step(self, foreseen: Mapping[str, int]) -> Hashable:
        """Fix the number of slots for dead latents: a power of two, so that few different steps are captured."""
        n = foreseen.get("most_dead", 0)
        self.dead_slots = min(len(self.own_latents), 1 << (n - 1).bit_length()) if n else 0
        return self.dead_slots

    def decoder_norms(self) -> Float[Tensor, " f"]:
        """Return |W_dec_i| over all sources and dimensions."""
        return self.W_dec.flatten(1).norm(dim=1)

    def before_step(self) -> None:
        if self.unit_norm:
            super().before_step()

    def after_step(self) -> None:
        if self.unit_norm and not self.frozen_decoder:
            super().after_step()


def check_tied(tied: bool, frozen_decoder: bool, encoder_norm: float | str, n_inputs: int) -> None:
    """Raise a SettingError if one parameter cannot be both W_enc and W_dec under the other settings."""
    if tied and frozen_decoder:
        raise SettingError("{tied}=true with {frozen_decoder}=true leaves nothing to train: choose one of them.")
    if tied and encoder_norm not in ("drawn", "unit", 1):
        raise SettingError(
            f"{{encoder_norm}}={encoder_norm} is impossible with {{tied}}=true, since the rows of W_dec have norm 1: "
            "give {encoder_norm}=drawn or {tied}=false."
        )
    if tied and n_inputs:
        raise SettingError(
            "{tied}=true is impossible for a transcoder, since its W_enc and W_dec are of different sites: "
            "give {tied}=false."
        )


def check_starts(encoder_bias: bool, b_enc_init: float | str, frozen_decoder: bool, b_dec_init: str) -> None:
    """Raise a SettingError if a bias that is missing or not trained is to start somewhere."""
    if not encoder_bias and b_enc_init != "zeros":
        raise SettingError(
            f"{{b_enc_init}}={b_enc_init} needs a b_enc: give {{encoder_bias}}=true, or {{b_enc_init}}=zeros."
        )
    if frozen_decoder and b_dec_init != "zeros":
        raise SettingError(
            f"{{b_dec_init}}={b_dec_init} would change b_dec, which {{frozen_decoder}}=true forbids: "
            "give {b_dec_init}=zeros."
        )
