"""The training step of one SAE or of many, as a LightningModule that knows no architecture."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.errors import UserError
from sae_lab.metrics import ReconstructionMetrics, batch_fvu
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.sparse import l0_per_row


class SAEModule(L.LightningModule):
    """Trains every SAE of a dict on the same batches; a member of many equals, bit for bit, the same SAE alone.

    resample -> forward -> backward -> project gradients -> clip -> optimizer step -> project parameters (SPEC §3.2),
    each SAE by itself: one optimizer with a parameter group per SAE, and one gradient norm per SAE.

    Args:
        saes: by name; the name prefixes what is logged where there are several.
        optimizer: parameter groups -> torch optimizer.
        schedule: step -> factor of the learning rate.
        max_grad_norm: clip each SAE's gradient to this norm; None does not clip.
    """

    tokens: Tensor
    """How many rows were trained on."""

    def __init__(
        self,
        saes: Mapping[str, BaseSAE],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        max_grad_norm: float | None = None,
    ):
        super().__init__()
        self.saes = nn.ModuleDict(saes)
        self.validation = nn.ModuleDict({name: ReconstructionMetrics(sae.n_latents) for name, sae in saes.items()})
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm

    def members(self) -> Iterator[tuple[str, BaseSAE]]:
        """(name, SAE), in order."""
        yield from self.saes.items()  # type: ignore[misc]

    def log_as(self, name: str, row: dict[str, Any]) -> None:
        """Log a member's figures, under its name where there are several."""
        prefix = "" if len(self.saes) == 1 else f"{name}/"
        self.log_dict({prefix + key: value for key, value in row.items()})

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(sae.parameters())} for _, sae in self.members()]
        optimizer = self.optimizer(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, x: Float[Tensor, "b s d"], batch_idx: int) -> Tensor:
        logging = (batch_idx + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        total = x.new_zeros((), dtype=torch.float32)
        for name, sae in self.members():
            for parameter, rows in sae.resample(x):
                forget(self.trainer.optimizers[0], parameter, rows)
            out = sae(x)
            terms = sae.losses(out)
            loss = torch.stack(list(terms.values())).sum()
            total = total + loss
            if logging:
                self.refuse_unless_finite(loss)
                self.log_as(name, training_row(sae, out, terms, loss))
        self.tokens += len(x)
        if logging:
            self.log_dict({"tokens": self.tokens.float(), "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for _, sae in self.members():
            self.refuse_unless_finite(torch.stack([p.detach().abs().max() for p in sae.parameters()]).max())

    def refuse_unless_finite(self, value: Tensor) -> None:
        """Looked at when something is logged or saved, and not more often: a GPU would have to be waited for."""
        if not value.isfinite():
            raise UserError(
                f"training has diverged by step {self.trainer.global_step} (a loss or a weight is {value.item()}): "
                "lower optimizer.lr, or set max_grad_norm."
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for _, sae in self.members():
            sae.before_step()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.max_grad_norm is not None:
            for _, sae in self.members():
                nn.utils.clip_grad_norm_(sae.parameters(), self.max_grad_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for _, sae in self.members():
            sae.after_step()

    def validation_step(self, x: Float[Tensor, "b s d"], batch_idx: int) -> None:
        for name, sae in self.members():
            self._totals(name).update(x, *sae.autoencode(x), sae.covers(x))

    def on_validation_epoch_end(self) -> None:
        for name, _ in self.members():
            values = self._totals(name).compute()
            self.log_as(name, {f"val/{key}": values[key] for key in ("nmse", "fvu", "l0", "dead_fraction")})
            self._totals(name).reset()

    def _totals(self, name: str) -> ReconstructionMetrics:
        return self.validation[name]  # type: ignore[return-value]


def forget(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: Int[Tensor, " n"]) -> None:
    """Zero what the optimizer has gathered about some rows of a parameter; its count of steps stays."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0


@torch.no_grad()
def training_row(sae: BaseSAE, out: SAEOutput, terms: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """What the training log says of one SAE at one step."""
    row = {"loss": loss.detach()} | {f"loss/{name}": term.detach() for name, term in terms.items()}
    row |= {"fvu": batch_fvu(out.target, out.x_hat), "l0": l0_per_row(out.code).float().mean()}
    sources = zip(out.target.split(1, dim=1), out.x_hat.split(1, dim=1), strict=True)
    row |= {f"fvu_{i}": batch_fvu(*pair) for i, pair in enumerate(sources)} if out.target.shape[1] > 1 else {}
    dead = sae.dead()
    return row if dead is None else row | {"dead_share": dead.float().mean()}
