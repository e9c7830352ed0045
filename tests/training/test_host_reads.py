"""A run on a GPU waits for it where a row is logged, and for the numbers of plans, and nowhere else.

test_recorded_steps.py shows the same of what is captured. This is about all that `SAEModule.training_step` does.
"""

import pytest
import torch
from fitting import fit
from host_reads import NoHostFunctions, NoHostOperations, host_allowed
from recorded_graph import Recorded
from step_kinds import build_kind, rows

from sae_lab.runtime.device import Reading
from sae_lab.saes.base import BaseSAE
from sae_lab.training import capture, plans
from sae_lab.training.capture import CapturedStep, PrepareSteps, set_capturable
from sae_lab.training.module import SAEModule
from sae_lab.training.step import TrainingStep

N, EVERY = 9, 4
"""Steps; every which of them a row is logged. Some are eager, and some are replayed."""


class Allowed(Reading):
    """The numbers of a plan, which are sent while the GPU computes and awaited one step late."""

    def __init__(self, numbers):
        with host_allowed():
            super().__init__(numbers)

    def wait(self):
        with host_allowed():
            return super().wait()


def prepare(step, *_):
    set_capturable(step.optimizer, True)
    return CapturedStep(step, True, Recorded)


@pytest.fixture
def checked(monkeypatch) -> dict[int, bool]:
    """Steps as on a GPU, which raise where the host reads or sends numbers.

    Returns the numbers of those that did not, and whether there was a graph by then.

    The first two steps are not checked, which find out whether an SAE has started and plan from the SAE as it is, nor
    are those with a row.
    """
    take, taken = SAEModule.training_step, {}

    def training_step(module, batch, i):
        if i < 2 or (i + 1) % EVERY == 0:
            take(module, batch, i)
            return
        with NoHostFunctions(), NoHostOperations():
            take(module, batch, i)
        taken[i] = bool(module.step.graphs)

    monkeypatch.setattr("sae_lab.training.step.has_fixed_size", lambda x: True)
    monkeypatch.setattr(plans, "Reading", Allowed)
    monkeypatch.setattr(capture, "prepare_step", prepare)
    monkeypatch.setattr(SAEModule, "training_step", training_step)
    return taken


def fit_kind(kind: str) -> None:
    sae = build_kind(kind)
    batches = [rows(sae, i) for i in range(N)]
    fit(sae, batches=batches, log_every_n_steps=EVERY, callbacks=[PrepareSteps("auto", "auto")])


KINDS = ["batch_topk", "temporal", "jumprelu", "route", "vanilla", "whitened", "warmup", "cross_layer"]
"""Those that differ in what they do before a step, and in what they foresee."""


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_nothing_but_plans_and_what_it_logs(kind, checked):
    fit_kind(kind)
    assert list(checked) == [2, 4, 5, 6, 8]
    assert checked[8] == (kind != "warmup")  # where each step has another k


def test_resampling_reads_the_number_of_steps(checked):
    """docs/speed.md says so."""
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense.* reads a number"):
        fit_kind("resampled")


PLACES = {
    "before": (TrainingStep, "__call__"),
    "resample": (BaseSAE, "resample"),
    "run": (TrainingStep, "run"),
    "foresee": (BaseSAE, "foresee"),
    "after": (SAEModule, "count_step"),
}
READS = {
    "item": torch.Tensor.item,
    "nonzero": torch.Tensor.nonzero,
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "tensor": lambda x: torch.tensor([1.0]),
}


@pytest.mark.parametrize(
    ("place", "read"), [*((p, "item") for p in PLACES), *(("resample", r) for r in READS if r != "item")]
)
def test_another_read_does_not_pass(place, read, monkeypatch, checked):
    owner, name = PLACES[place]
    without = getattr(owner, name)

    def with_read(self, *args, **kwargs):
        READS[read](torch.ones(()))
        return without(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, with_read)
    with pytest.raises(RuntimeError, match="not permitted"):
        fit_kind("batch_topk")
    assert not checked
