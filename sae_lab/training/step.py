"""The training step of one SAE, the same in Lightning's loop, in a group, in measurements and in one's own loop."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.ops.fixed_size import fixed_size, is_fixed_size
from sae_lab.ops.matmul import Products, float32_products
from sae_lab.ops.sparse import HAS_TRITON
from sae_lab.parallel.gradients import averaged_gradients
from sae_lab.parallel.mesh import world_size
from sae_lab.parallel.shards import clip_gradients, share_overflow
from sae_lab.runtime.memory import release_fragments
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.training.plans import Plans
from sae_lab.training.row_adam import RowAdam
from sae_lab.training.splice_loss import Spliced


@dataclass(frozen=True)
class StepResult:
    """What a training step computed: the SAE's output, the named loss terms and their sum."""

    out: SAEOutput | None
    """None if the batch was taken in parts, since their outputs are not kept."""
    terms: dict[str, Tensor]
    loss: Tensor
    kl: Tensor | None = None
    """The KL divergence in nats, if it has a part in the loss."""
    foreseen: dict[str, Tensor] = field(default_factory=dict)
    """What the SAE foresees, in fixed-size mode, of the step after the next (see training/plans.py)."""
    watched: dict[str, Tensor] | None = None
    """What a Watch made of the step."""

    def detach(self) -> "StepResult":
        """Return the same numbers without autograd's graph."""
        return _detach(self)

    def for_the_log(self) -> "StepResult":
        """Return what the log needs, without autograd's graph and without h, which a graph would keep in memory."""
        return replace(self, out=None if self.out is None else replace(self.out, h=None)).detach()

    def watched_by(self, watch: "Watch | None") -> "StepResult":
        """Return the result with what `watch` makes of it."""
        return self if watch is None else replace(self, watched=watch(self))


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detach, value))
    if isinstance(value, dict):
        return {name: _detach(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _detach(getattr(value, field.name)) for field in fields(value)})
    return value


Splice: TypeAlias = Callable[[BaseSAE, Tensor], Spliced]
"""SpliceLoss of one batch: a function of the SAE and the reconstruction term of its loss."""
Watch: TypeAlias = Callable[[StepResult], dict[str, Tensor]]
"""Computes, by the functions of parallel/collectives.py, numbers of a step on the whole batch."""


class TrainingStep:
    """A training step is

        resample -> plan -> forward -> backward -> average gradients over ranks -> project gradients -> clip
        -> optimizer step -> project parameters

    On a GPU everything after `plan` is free of questions from the host (see ops/fixed_size.py), so that it can be
    captured as a CUDA graph (see training/capture.py).

    Autocast, if it is on, applies to the forward pass and the losses alone.

    Args:
        sae: the SAE to train.
        optimizer: an optimizer of its parameters.
        max_grad_norm: clip the gradient to this norm; None does not clip.
        forward: the forward pass; the SAE's own by default.
    """

    def __init__(
        self,
        sae: BaseSAE,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None = None,
        forward: Callable[[BaseSAE, Tensor], SAEOutput] = nn.Module.__call__,
    ):
        self.sae, self.optimizer, self.max_grad_norm, self.forward = sae, optimizer, max_grad_norm, forward
        self.row_adam, self.plans = RowAdam(sae, optimizer), Plans(sae)
        self.why_eager: str | None = None
        """Why the step cannot be captured, whatever the SAE and the optimizer."""
        self.products: Products = "highest"
        """Precision of float32 products. Parameters and their updates are float32 in any case."""
        self.scaler: torch.amp.GradScaler | None = None
        """Scales the loss for float16, in which gradients of a mean over (b, s, d) would be zero (trainer.precision=
        16-mixed). Gradients are divided by the scale before they are projected and clipped. A step whose gradients
        overflow changes no parameter and halves the scale; many steps without one double it. The scale is in the
        checkpoint, as Lightning keeps it there."""

    def __call__(
        self, x: Float[Tensor, "b s d"], splice: Splice | None = None, watch: Watch | None = None
    ) -> StepResult:
        """Take the step on a batch.

        Args:
            splice: adds the language model's part of the loss.
            watch: makes what is wanted of the step besides the loss.
        """
        release_fragments()
        for parameter, rows in self.sae.resample(x):
            reset_optimizer_rows(self.optimizer, parameter, rows)
        with fixed_size(self.has_fixed_size(x)), float32_products(self.products):
            plan = None
            if is_fixed_size():
                self.row_adam.refresh_copies()
                plan = self.plans.next()
            result = self.run(x, plan, splice, watch)
            if is_fixed_size():
                self.row_adam.tell_others()
                self.plans.add(result.foreseen)
        torch.clear_autocast_cache()  # it has casts of the weights of before this step
        return result

    def has_fixed_size(self, x: Tensor) -> bool:
        """Return whether the step on x has shapes that do not depend on data."""
        return has_fixed_size(x)

    def run(
        self, x: Float[Tensor, "b s d"], plan: Hashable, splice: Splice | None = None, watch: Watch | None = None
    ) -> StepResult:
        """Take the part of the step that can be captured."""
        torch.clear_autocast_cache()  # weights that were cast before a capture would not be cast again by its replays
        self.optimizer.zero_grad()
        by_row = is_fixed_size() and self.scaler is None and self.max_grad_norm is None
        with self.row_adam.collect(by_row):
            result = self.compute(x, splice)
            with averaged_gradients(self.sae.parameters()):
                self.backward(result.loss)
            with torch.autocast(x.device.type, enabled=False):
                self.update()
        if is_fixed_size():
            result = replace(result, foreseen=self.sae.foresee(1))
        return result.watched_by(watch)

    def compute(self, x: Float[Tensor, "b s d"], splice: Splice | None = None) -> StepResult:
        """Run the forward pass and compute the loss."""
        out = self.forward(self.sae, x)
        terms = self.sae.losses(out)
        spliced = splice(self.sae, terms["reconstruction"]) if splice else None
        terms |= {"kl": spliced.term} if spliced else {}
        loss = torch.stack(list(terms.values())).sum()
        return StepResult(out, terms, loss, spliced.kl if spliced else None)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of the loss."""
        with torch.autocast(loss.device.type, enabled=False):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> None:
        """Update the parameters by the gradients of a batch."""
        self.row_adam.settle()
        if self.scaler is not None:
            share_overflow(self.sae.parameters())
            self.scaler.unscale_(self.optimizer)
        self.sae.before_step()
        if self.max_grad_norm is not None:
            sharded = self.sae.latent_axes()
            clip_gradients(((p, name in sharded) for name, p in self.sae.named_parameters()), self.max_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.row_adam.step()
        self.sae.after_step()
        self.row_adam.update_copies()


def has_fixed_size(x: Tensor) -> bool:
    """Return whether a step on x has shapes that do not depend on data: on a GPU, with Triton, in one process.

    Several ranks exchange tensors whose sizes depend on data.
    """
    return x.is_cuda and HAS_TRITON and world_size() == 1


def reset_optimizer_rows(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: Int[Tensor, " n"]) -> None:
    """Reset the optimizer's moments for some rows of a parameter. Its step count stays."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0
