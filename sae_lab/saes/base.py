"""The contract of every SAE: what training, evaluation and files rely on, whatever the architecture.

Shapes: b rows (tokens), s sources (sites x models; 1 for a plain SAE), d activation width, f latents. A transcoder
reads the first r sources and writes the w others; for all else r = w = s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab.ops.sparse import Code
from sae_lab.runtime.errors import UserError
from sae_lab.saes.registry import Registered

AnySAE = TypeVar("AnySAE", bound="BaseSAE")
Edit: TypeAlias = Callable[[Float[Tensor, "b f"]], Float[Tensor, "b f"]]
"""What an intervention makes of a dense code."""


@dataclass(frozen=True)
class SAEOutput:
    """What a forward pass gives, in the SAE's own (normalised) units."""

    x: Float[Tensor, "b r d"]
    """What was encoded: the normalised input, or what an SAE makes of it first (r = 1 for a routed row)."""
    target: Float[Tensor, "b w d"]
    """What x_hat is judged against: x itself, but of a transcoder, which predicts other sources than it reads."""
    x_hat: Float[Tensor, "b w d"]
    code: Code
    h: Float[Tensor, "b f"] | None = None
    """The pre-activations, for losses that need them; None where they never exist as a whole (sparse codes)."""


class BaseSAE(Registered, ABC):
    """A dictionary learner over rows of activations `(b, s, d)`; where s is 1, `(b, d)` does as well.

    In `train()` an SAE uses the rule it is trained with (which may look at the whole batch), in `eval()` the rule it
    is deployed with (each row by itself). Only `forward` in train mode changes state, so an evaluation never does,
    under either rule.
    """

    batch_rule: bool = False
    """Whether the training rule for one row depends on the other rows of its batch."""
    foldable: bool = False
    """Whether each latent decides by itself if it is active. Its code may then change units, as it does where the norm
    of its row of W_dec is folded into it; a rule that compares latents would choose others."""
    pre_activation_parameters: tuple[str, ...] = ("b_enc",)
    """The parameters, one number a latent, that h is compared with or added to: they have the units of a code."""

    n_sources: int
    d_in: int
    n_latents: int
    n_inputs: int = 0
    """How many of the sources, the first ones, are input alone: x_hat is of the others. 0: every source is both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(rename_old_tensors)

    def convert_to(self, cls: type[AnySAE], **changes: Any) -> AnySAE:
        """An SAE of another class with these parameters, and these settings as far as it knows them.

        `sae.convert_to(TopKSAE, k=8)` is this dictionary under the rule of TopK. It shares no memory with this one.

        Raises:
            UserError: the class needs a setting that this SAE lacks, or has no place for a parameter of this SAE.
        """
        known = cls.arguments()
        config = {name: value for name, value in self.config.items() if name in known} | changes
        other = self.from_config(cls.__name__, config)
        assert isinstance(other, cls)
        other.start_from(self)
        return other.to(next(self.parameters()).device).train(self.training)

    @torch.no_grad()
    def start_from(self, other: "BaseSAE") -> None:
        """Take over every parameter of `other`, and its buffers as far as this SAE has them; what it lacks stays.

        Raises:
            UserError: there is no place for one of the parameters, or one of another shape, or they are in the units
                of another normalisation.
        """
        check_units(self, other)
        check_room(self, other)
        own = self.state_dict()
        for name, tensor in other.state_dict().items():
            if name in own:
                own[name].copy_(tensor)

    @abstractmethod
    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        """Encode and decode; in train mode also update thresholds and dead-latent counters."""

    @abstractmethod
    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        """The named terms of the training loss, already weighted; their sum is minimised."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "b s d"] | Float[Tensor, "b d"]) -> Code:
        """Raw activations -> code."""

    @abstractmethod
    def decode(self, code: Code) -> Float[Tensor, "b w d"]:
        """Code -> x_hat in the SAE's own (normalised) units."""

    @abstractmethod
    def autoencode(self, x: Float[Tensor, "*row d"], edit: Edit | None = None) -> tuple[Float[Tensor, "*row d"], Code]:
        """Raw activations -> (x_hat in raw units, in the shape and dtype of x; code). Changes no state in any mode.

        With `edit`, x_hat and code are those of the code that it makes of the rows' own, a dense (b, f).
        """

    @abstractmethod
    def directions(self) -> Float[Tensor, "f w d"]:
        """The dictionary: what one unit of each latent adds to x_hat, in the SAE's own (normalised) units."""

    def reconstruct(self, x: Float[Tensor, "*row d"], edit: Edit | None = None) -> Float[Tensor, "*row d"]:
        """Raw activations -> x_hat in raw units, in the shape and dtype of x.

        `edit` ablates or steers: `sae.reconstruct(x, lambda z: z.index_fill(1, latents, 0.0))`. To leave what the SAE
        does not explain as it is, take x + sae.reconstruct(x, edit) - sae.reconstruct(x).
        """
        return self.autoencode(x)[0] if edit is None else self.autoencode(x, edit)[0]

    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        """Before the forward pass of a training batch: give dead latents a new start, where it is time for that.

        Returns the parameters that were rewritten and in which rows, whose moments the optimizer is to forget.
        """
        return []

    def before_step(self) -> None:
        """Between the backward pass and gradient clipping: project gradients."""

    def after_step(self) -> None:
        """After the optimizer's step: put parameters back where constraints want them."""

    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        """The i-th batch after training, weights frozen: estimate what inference needs, starting over at i = 0."""

    def dead(self) -> Tensor | None:
        """(f,) bool: which latents count as dead in training; None where nobody counts."""
        return None

    def predicted_mask(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        """At which sources of each row `reconstruct` says something of its own: it gives x back at the others.

        None where it does at all of them.
        """
        return None

    def as_rows(self, x: Tensor, n_sources: int | None = None) -> Float[Tensor, "b s d"]:
        """`(b, d)` or `(b, s, d)` -> `(b, s, d)` in the dtype of the parameters; s is `n_sources`, or all of them.

        Raises:
            UserError: any other shape, or whole numbers.
        """
        s = self.n_sources if n_sources is None else n_sources
        if not x.is_floating_point():
            raise UserError(f"this SAE takes activations, floating-point numbers, not {x.dtype}: give x.float().")
        y = x.unsqueeze(1) if x.ndim == 2 and s == 1 else x
        if y.ndim != 3 or y.shape[1:] != (s, self.d_in):
            want = f"(b, {s}, {self.d_in})" + (f" or (b, {self.d_in})" if s == 1 else "")
            raise UserError(f"this SAE takes activations of shape {want}, not {tuple(x.shape)}.")
        return y.to(next(self.parameters()).dtype)


RENAMED = {"normalizer.": "sources.normalizer.", "target_normalizer.": "sources.target_normalizer."}
"""The beginnings of an SAE's tensor names in earlier versions, and what they are now."""


def rename_old_tensors(sae: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded, rename in place the tensors that an earlier version has saved."""
    for name in list(state_dict):
        for old, new in RENAMED.items():
            if name.startswith(prefix + old):
                state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)


def check_sizes(sae: BaseSAE, other: BaseSAE) -> None:
    """Raise a UserError unless both are about the same numbers of sources, inputs, dimensions and latents."""
    for name in ("n_sources", "n_inputs", "d_in", "n_latents"):
        there, here = getattr(other, name), getattr(sae, name)
        if there != here:
            raise UserError(f"an SAE with {name}={there} cannot start one with {name}={here}: make them equal.")


def check_units(sae: BaseSAE, other: BaseSAE) -> None:
    """Raise a UserError where `other` normalises its input otherwise than `sae`.

    A scale that is learnt from the data is no matter of the config: it comes along with the parameters.
    """
    theirs = other.config.get("normalize")
    if theirs != sae.config.get("normalize"):
        raise UserError(f"the parameters of an SAE with normalize={theirs} want sae.normalize={theirs} here as well.")


def check_room(sae: BaseSAE, other: BaseSAE) -> None:
    """Raise a UserError unless `sae` has a place of the same shape for every parameter of `other`."""
    check_sizes(sae, other)
    shapes = {name: tuple(parameter.shape) for name, parameter in sae.named_parameters(remove_duplicate=False)}
    for name, parameter in other.named_parameters():
        there, here = tuple(parameter.shape), shapes.get(name)
        if here != there:
            place = "no such parameter" if here is None else f"{here}"
            raise UserError(
                f"the parameter {name} {there} of a {type(other).__name__} has no place in this {type(sae).__name__} "
                f"({place}): choose the class and the settings that have one, such as sae.encoder_bias=true for b_enc."
            )
