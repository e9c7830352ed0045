"""The training step as a LightningModule, independent of the architecture."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.activations.finite import check_finite
from sae_lab.evaluation.metrics import ReconstructionMetrics, batch_fvu
from sae_lab.ops.sparse import l0_per_row
from sae_lab.parallel.collectives import average_gradients, mean_over_ranks, world_size
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE, SAEOutput

log = logging.getLogger(__name__)

NO_AUTOCAST = nullcontext()


class SAEModule(L.LightningModule):
    """Trains one SAE. A training step is

        resample -> forward -> backward -> project gradients -> clip -> optimizer step -> project parameters

    With several processes, each takes this step on its share of the batch. Gradients are averaged right after the
    backward pass.

    Args:
        sae: the SAE to train.
        optimizer: function from parameters to a torch optimizer.
        schedule: function from step to factor of the learning rate.
        max_grad_norm: clip the gradient to this norm; None does not clip.
    """

    tokens: Tensor
    """Number of rows trained on so far."""

    def __init__(
        self,
        sae: BaseSAE,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        max_grad_norm: float | None = None,
    ):
        super().__init__()
        self.sae, self.validation = sae, ReconstructionMetrics(sae.n_latents)
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm
        self._left_out: set[str] = set()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(list(self.sae.parameters()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        # The count that numbers the rows of the log. Lightning 2.6 counts one step too many when it resumes from a
        # checkpoint of between a validation and the next batch, and skips that validation.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, x: Float[Tensor, "b s d"], batch_idx: int) -> Tensor:
        for parameter, rows in self.sae.resample(x):
            reset_optimizer_rows(self.trainer.optimizers[0], parameter, rows)
        out = self.sae(x)
        terms = self.sae.losses(out)
        loss = torch.stack(list(terms.values())).sum()
        self.tokens += len(x) * world_size()
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            row = training_row(self.sae, out, terms, loss)
            self.raise_if_diverged(row["loss"], x)
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log_dict(self.finite(row) | {"tokens": self.tokens.float(), "lr": lr})
        return loss

    def on_after_backward(self) -> None:
        average_gradients(self.sae.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.raise_if_diverged(torch.stack([p.detach().abs().max() for p in self.sae.parameters()]).max())

    def raise_if_diverged(self, value: Tensor, x: Float[Tensor, "b s d"] | None = None) -> None:
        """Raise a UserError if `value` is not finite, about the batch x if that is the cause.

        Called only when something is logged or saved, because reading the value makes the host wait for the GPU.
        """
        if not value.isfinite():
            if x is not None:
                check_finite(x, [f"source {i}" for i in range(x.shape[1])], "give batches of finite numbers.")
            raise UserError(
                f"training has diverged by step {self.trainer.global_step} (a loss or a weight is {value.item()}): "
                "lower optimizer.lr, or set max_grad_norm."
            )

    def finite(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the finite values of a row to log. The first time that one is left out, a warning names it."""
        known = torch.stack([torch.as_tensor(value).float() for value in row.values()]).isfinite().tolist()
        left_out = {name for name, is_finite in zip(row, known, strict=True) if not is_finite}
        if new := sorted(left_out - self._left_out):
            log.warning(
                "step %d: %s left out of the log: not finite, as where all rows of a batch are the same.",
                *(self.trainer.global_step, ", ".join(new)),
            )
        self._left_out |= left_out
        return {name: value for name, value in row.items() if name not in left_out}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.sae.before_step()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.sae.parameters(), self.max_grad_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.sae.after_step()

    def validation_step(self, x: Float[Tensor, "b s d"], batch_idx: int) -> None:
        self.validation.update(x, *self.sae.autoencode(x), self.sae.predicted_mask(x))

    def on_validation_epoch_end(self) -> None:
        values = self.validation.compute()
        chosen = {f"val/{key}": values.get(key, torch.nan) for key in ("nmse", "fvu", "l0", "dead_fraction")}
        self.log_dict(self.finite(chosen))
        self.validation.reset()


def plain_step(
    sae: BaseSAE,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "b s d"],
    forward: Callable[[Any, Tensor], SAEOutput] = nn.Module.__call__,
    autocast: AbstractContextManager = NO_AUTOCAST,
) -> None:
    """Take the training step of SAEModule without Lightning."""
    for parameter, rows in sae.resample(x):
        reset_optimizer_rows(optimizer, parameter, rows)
    optimizer.zero_grad()
    with autocast:
        loss = torch.stack(list(sae.losses(forward(sae, x)).values())).sum()
    loss.backward()
    sae.before_step()
    optimizer.step()
    sae.after_step()


def reset_optimizer_rows(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: Int[Tensor, " n"]) -> None:
    """Reset the optimizer's moments for some rows of a parameter. Its step count stays."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0


@torch.no_grad()
def training_row(sae: BaseSAE, out: SAEOutput, terms: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """Return the values to log for one SAE at one step."""
    row = {"loss": mean_over_ranks(loss)} | {f"loss/{name}": mean_over_ranks(term) for name, term in terms.items()}
    row |= {"fvu": batch_fvu(out.target, out.x_hat), "l0": mean_over_ranks(l0_per_row(out.code).float().mean())}
    if out.target.shape[1] > 1:
        sources = zip(out.target.split(1, dim=1), out.x_hat.split(1, dim=1), strict=True)
        row |= {f"fvu_{i}": batch_fvu(*pair) for i, pair in enumerate(sources, start=sae.n_inputs)}
    dead = sae.dead()
    return row if dead is None else row | {"dead_share": dead.float().mean()}
