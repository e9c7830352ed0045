"""Runs of captured and eager steps, for tests that compare them to the bit."""

from contextlib import nullcontext
from functools import partial

import torch
from conftest import dictionary, equal
from recorded_graph import Recorded
from step_kinds import rows
from torch.utils._pytree import tree_map_only

from sae_lab.ops.sparse import fire_counts
from sae_lab.training.capture import CapturedStep, set_capturable
from sae_lab.training.module import training_row
from sae_lab.training.step import TrainingStep

N, FEW = 24, 10
"""Steps. Four without dead latents, four with them, and so on."""
ADAM = partial(torch.optim.Adam, lr=1e-2, fused=True)


def bf16(on=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def row_and_counts(sae, result):
    """What training logs, and what a code derives from its entries when it is first asked."""
    return training_row(sae, result) | {"fired": fire_counts(result.out.code).float()}


class Run:
    """N steps of an SAE, at a rate that falls with each, on batches before which latents die or come back.

    Args:
        record: makes the graphs; None: all steps are eager.
        max_grad_norm, optimizer: see TrainingStep.
        around: context of each step.
        before: called with the SAE and the step's number before each step.
    """

    def __init__(
        self, sae, record=Recorded, max_grad_norm=None, optimizer=ADAM, around=nullcontext,
        before=lambda sae, i: None, required=True,
    ):  # fmt: skip
        self.sae, self.optimizer = sae, optimizer(sae.parameters())
        sae.moments = self.optimizer.state
        set_capturable(self.optimizer, True)
        step = TrainingStep(sae, self.optimizer, max_grad_norm)
        self.step = CapturedStep(step, required, record) if record else step
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: 1 / (1 + i))
        self.around, self.before, self.log = around, before, []
        self.batches = [rows(sae, i) for i in range(N)]

    def take(self, i: int) -> None:
        if i % 4 == 0:
            dictionary(self.sae).batches_since_fired.zero_()[10:27] = 99 * (i % 8 > 0)
        self.before(self.sae, i)
        with self.around():
            row = self.step(self.batches[i], None, partial(row_and_counts, self.sae)).watched
        self.log.append(copied(row))  # the next step may overwrite it
        self.schedule.step()

    def all(self, n: int = N) -> "Run":
        for i in range(n):
            self.take(i)
        return self

    def tensors(self):
        return tensors(self.step) | {"log": self.log}


def tensors(step: TrainingStep):
    """All tensors that steps change, by name."""
    of_sae = dict(step.sae.named_parameters()) | dict(step.sae.named_buffers())
    return {"sae": of_sae, "optimizer": step.optimizer.state_dict()["state"]}


def differences(a, b, name="") -> list[str]:
    """The paths at which two nested containers of tensors are not equal to the bit."""
    if isinstance(a, dict | list) and len(a) == len(b):
        items = a.items() if isinstance(a, dict) else enumerate(a)
        return [path for key, value in items for path in differences(value, b[key], f"{name}/{key}")]
    return [] if equal(a, b) else [name]


def copied(tree):
    return tree_map_only(torch.Tensor, torch.clone, tree)
