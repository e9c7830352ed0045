"""Plans of steps in fixed-size mode: when the host reads, and that a resumed run plans what a whole one does."""

import pytest
import torch
from conftest import build, dictionary
from fitting import BATCHES, DEAD, fit
from recorded_graph import Recorded

from sae_lab.runtime import device
from sae_lab.saes import TopKSAE
from sae_lab.training import plans
from sae_lab.training.capture import CapturedStep, PrepareSteps, set_capturable
from sae_lab.training.step import TrainingStep


def step_of(name: str, *settings: str) -> TrainingStep:
    sae = build(name, *settings).train()
    return TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))


class Watched(device.Reading):
    """A reading that notes when it was made and when the host waited for it, in steps taken so far."""

    log: tuple[str, int]

    def __init__(self, numbers):
        super().__init__(numbers)
        self.made = Watched.now()

    def wait(self):
        Watched.waits.append((self.made, Watched.now()))
        return super().wait()


def test_the_host_waits_for_no_step_but_the_one_before_the_last(fixed, monkeypatch):
    monkeypatch.setattr(plans, "Reading", Watched)
    step = step_of("batch_topk", DEAD)
    Watched.now, Watched.waits = (lambda: int(step.sae.steps)), []
    for x in BATCHES:
        step(x)
    # The first two plans read the SAE as it was before the first step; the plan after n steps reads what was known
    # after n - 1 of them.
    assert Watched.waits == [(0, 0), (0, 1), *((n - 1, n) for n in range(2, len(BATCHES)))]


def test_nothing_is_read_where_no_shape_depends_on_the_sae(fixed, monkeypatch):
    monkeypatch.setattr(plans, "Reading", None)  # which cannot be called
    step = step_of("batch_topk", "sae.auxk_coefficient=0")
    for x in BATCHES:
        step(x)
    assert step.sae.steps == len(BATCHES)


@pytest.mark.parametrize(("settings", "n_k"), [([DEAD], 1), ([DEAD, "sae.k_warmup=9"], 10)])
def test_there_is_room_for_all_dead_latents_and_k_is_that_of_the_step(fixed, settings, n_k):
    step, seen = step_of("topk", *settings), []

    def forward(sae, x):
        out = sae(x)
        scheduled = sae.scheduled_k(int(sae.steps) - 1) if sae.k_warmup else sae.k
        seen.append((int(sae.dead().sum()), sae.dead_slots, sae.planned_k, scheduled))
        return out

    step.forward = forward
    for x in BATCHES:
        step(x)
    assert max(dead for dead, *_ in seen) > 8
    assert all(dead <= slots for dead, slots, *_ in seen)
    assert [planned for *_, planned, _ in seen] == [scheduled for *_, scheduled in seen]
    assert len({planned for *_, planned, _ in seen}) == n_k


def test_counters_that_someone_else_has_changed_are_read_anew(fixed):
    step = step_of("batch_topk", "sae.dead_after=1000")
    slots = []
    for n in (0, 5, 40, 0):
        dictionary(step.sae).batches_since_fired.zero_()
        dictionary(step.sae).batches_since_fired[:n] = 10**6
        step(BATCHES[0])
        slots.append(step.sae.dead_slots)
    assert slots == [0, 8, 64, 0]


@pytest.mark.parametrize("setting", [{"dead_after": 3}, {"auxk_coefficient": 1 / 32}, {"k_warmup": 20}])
@pytest.mark.parametrize("other", [{}, {"k_warmup": 9}], ids=["", "k warms up"])
def test_settings_that_someone_has_changed_are_planned_by(fixed, setting, other):
    step = step_of("topk", "sae.dead_after=1000", "sae.auxk_coefficient=0" if "auxk_coefficient" in setting else DEAD)
    seen = []

    def forward(sae, x):
        out = sae(x)
        seen.append((int(sae.dead().sum()) if sae.auxk_coefficient else 0, sae.dead_slots))
        return out

    step.forward = forward
    vars(step.sae).update(other)
    for i, x in enumerate(BATCHES):
        if i == 6:
            vars(step.sae).update(setting)
        step(x)
    assert all(dead <= slots for dead, slots in seen)


def test_two_captured_steps_of_one_sae_see_each_other(fixed):
    sae = build("batch_topk", "sae.dead_after=6", "sae.k=1").train()
    steps = []
    for _ in range(2):
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
        set_capturable(optimizer, True)
        steps.append(CapturedStep(TrainingStep(sae, optimizer), required=True, record=Recorded))
    slots = set()
    for _ in range(4):
        dictionary(sae).batches_since_fired.zero_()
        for step, n in zip((*steps, steps[0]), (3, 8, 3), strict=True):
            for x in BATCHES[:n]:
                step(x)
                assert int(sae.dead().sum()) <= sae.dead_slots
                slots.add(sae.dead_slots)
    assert all(step.graphs for step in steps)
    assert len(slots) > 2


def test_a_module_that_is_fitted_again_plans_anew(fixed, tmp_path):
    options = {"callbacks": [PrepareSteps("auto", "auto")], "enable_checkpointing": False}
    fit(build("topk"), batches=BATCHES[:4], **options).trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = fit(build("topk"), batches=BATCHES[4:], ckpt=tmp_path / "half.ckpt", max_epochs=2, **options)
    assert again.foreseen == {}


def test_a_checkpoint_of_a_validation_keeps_what_is_known(fixed):
    step = step_of("batch_topk", DEAD)
    for x in BATCHES:
        step(x)
    known = step.plans.state()
    assert known
    step.sae.eval()
    assert step.plans.state() == known


@pytest.mark.parametrize("half", [1, 5, 6, 7])
def test_a_resumed_run_plans_the_steps_of_a_whole_one(fixed, tmp_path, half, monkeypatch):
    """A plan changes how sums are rounded on a GPU, so the steps must be planned alike to be equal to the bit."""
    planned, plan_step = [], TopKSAE.plan_step
    monkeypatch.setattr(TopKSAE, "plan_step", lambda sae, known: planned.append(known) or plan_step(sae, known))
    settings = ("topk", "sae.dead_after=4", "sae.k_warmup=4")
    options = {"callbacks": [PrepareSteps("auto", "auto")], "enable_checkpointing": False}
    fit(build(*settings), **options)
    whole = list(planned)
    planned.clear()
    first = fit(build(*settings), batches=BATCHES[:half], **options)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(build(*settings), batches=BATCHES[half:], ckpt=tmp_path / "half.ckpt", max_epochs=2, **options)
    assert planned == whole
    assert len({known["most_dead"] for known in whole}) > 3


def test_a_reading_is_of_the_moment_when_it_was_made():
    numbers = torch.tensor([1, 2])
    reading = device.Reading(numbers)
    numbers.zero_()
    assert reading.wait() == [1, 2]
