"""The training step as a LightningModule, independent of the architecture."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.activations.finite import check_finite
from sae_lab.activations.text_batches import TextBatch
from sae_lab.evaluation.metrics import ReconstructionMetrics, RowMetric, batch_fvu, own_metrics
from sae_lab.ops.sparse import l0_per_row
from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.parallel.mesh import data_axis
from sae_lab.parallel.shards import mean_over_shards, sum_over_shards
from sae_lab.runs.sharded_checkpoint import move_to_shards, take_own_latents
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.training.splice_loss import SpliceLoss
from sae_lab.training.step import StepResult, TrainingStep

log = logging.getLogger(__name__)

AUTOMATIC = "epoch_loop.automatic_optimization.optim_progress"
MANUAL = "epoch_loop.manual_optimization.optim_step_progress"


class SAEModule(L.LightningModule):
    """Trains one SAE by `TrainingStep`. With several processes, each takes it on its share of the batch.

    Lightning's manual optimization leaves the whole step to `TrainingStep`, which can thus be captured as one CUDA
    graph, and calls no hooks between its parts.

    Args:
        sae: the SAE to train.
        optimizer: function from parameters to a torch optimizer.
        schedule: function from step to factor of the learning rate.
        max_grad_norm: clip the gradient to this norm; None does not clip.
        splice: the language model's part of the loss. Then a batch is a TextBatch.
        added: row metrics of one's own, which validation logs (see evaluation/metrics.py).
    """

    tokens: Tensor
    """Number of rows trained on so far."""
    provenance: Callable[[], dict[str, Any]] = dict
    """Returns what is saved with the SAE in the middle of training, too (see runs/provenance.py)."""

    def __init__(
        self,
        sae: BaseSAE,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        max_grad_norm: float | None = None,
        splice: SpliceLoss | None = None,
        added: Mapping[str, RowMetric] = MappingProxyType({}),
    ):
        super().__init__()
        self.automatic_optimization = False
        self.sae, self.validation = sae, ReconstructionMetrics(len(sae.own_latents), added)
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm
        self.splice = splice
        self.foreseen: dict[str, int] = {}  # `Plans.state` of the checkpoint from which training goes on
        self._left_out: set[str] = set()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(list(self.sae.parameters()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        self.step = TrainingStep(self.sae, optimizer, self.max_grad_norm)
        self.step.why_eager = "the loss runs the language model" if self.splice else None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def peak_rate(self) -> float:
        """The learning rate before the schedule's factor."""
        return float(self.step.optimizer.param_groups[0]["initial_lr"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The count that numbers the rows of the log. Lightning 2.6 counts one step too many when it resumes from a
        # checkpoint of between a validation and the next batch, and skips that validation.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, batch: Float[Tensor, "b s d"] | TextBatch, batch_idx: int) -> None:
        x = batch.x if isinstance(batch, TextBatch) else batch
        splice = partial(self.splice, batch=batch) if self.splice and isinstance(batch, TextBatch) else None
        regular = (batch_idx + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        due = regular or self.trainer.global_step in (0, self.trainer.max_steps - 1)
        row = self.step(x, splice, partial(training_row, self.sae) if due else None).watched
        self.tokens += len(x) * data_axis().size
        if row is not None:
            self.raise_if_diverged(row["loss"], x)
            lr = float(self.step.optimizer.param_groups[0]["lr"])
            self.write_row(self.finite(row) | {"tokens": self.tokens.float(), "lr": lr}, regular)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.count_step()

    def write_row(self, row: dict[str, Any], regular: bool) -> None:
        """Log a row. Lightning drops one that is not due, as those of the first and the last step may be."""
        if regular:
            self.log_dict(row)
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(
                {name: float(torch.as_tensor(value).detach()) for name, value in row.items()}, self.trainer.global_step
            )

    def count_step(self) -> None:
        """Raise `trainer.global_step` by one, which Lightning does where it wraps an optimizer's step."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the step count of a checkpoint that was saved under Lightning's automatic optimization.

        If the run has grown since its end, its one epoch is open again.
        """
        loop = checkpoint["loops"]["fit_loop"]
        if checkpoint["global_step"] < self.trainer.max_steps:
            loop["epoch_loop.batch_progress"]["is_last_batch"] = False
            for counts in loop["epoch_progress"].values():
                counts["processed"] = counts["completed"] = 0
        if loop[AUTOMATIC]["optimizer"]["step"]["total"]["completed"]:
            loop[MANUAL] = loop[AUTOMATIC]["optimizer"]["step"]
        self.foreseen = checkpoint.get("foreseen", {})
        take_own_latents(checkpoint, self.sae)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        largest = torch.stack([p.detach().abs().max() for p in self.sae.parameters()]).max()
        self.raise_if_diverged(sum_over_shards(largest))  # not finite if that of one shard is not
        checkpoint["foreseen"] = self.step.plans.state()
        move_to_shards(checkpoint, self.sae)

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

    def validation_step(self, x: Float[Tensor, "b s d"], batch_idx: int) -> None:
        self.validation.update(x, *self.sae.autoencode(x), self.sae.predicted_mask(x))

    def on_validation_epoch_end(self) -> None:
        values = self.validation.compute()
        names = ("nmse", "fvu", "l0", "dead_fraction", *own_metrics(self.validation.row_metrics))
        chosen = {f"val/{name}": values.get(name, torch.nan) for name in names}
        self.log_dict(self.finite(chosen))
        self.validation.reset()


@torch.no_grad()
def training_row(sae: BaseSAE, result: StepResult) -> dict[str, Tensor]:
    """Return the values to log for one SAE at one step."""
    out, terms = result.out, result.terms
    assert out is not None
    row = {"loss": mean_over_ranks(result.loss)}
    row |= {f"loss/{name}": mean_over_ranks(term) for name, term in terms.items()}
    row |= {} if result.kl is None else {"kl": result.kl}
    row |= {"fvu": batch_fvu(out.target, out.x_hat), "l0": mean_over_ranks(l0_per_row(out.code).float().mean())}
    if out.target.shape[1] > 1:
        sources = zip(out.target.split(1, dim=1), out.x_hat.split(1, dim=1), strict=True)
        row |= {f"fvu_{i}": batch_fvu(*pair) for i, pair in enumerate(sources, start=sae.n_inputs)}
    dead = sae.dead()
    return row if dead is None else row | {"dead_share": mean_over_shards(dead.float().mean())}
