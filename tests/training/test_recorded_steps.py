"""Steps that are recorded and replayed are the eager ones to the bit: of all SAEs, and in Lightning's loop.

The graphs are those of recorded_graph.py, so this needs no GPU.
"""

from functools import partial

import lightning as L
import pytest
import torch
from conftest import SAE_NAMES, build, planted
from fitting import DEAD, fit
from recorded_graph import Recorded
from recorded_runs import FEW, N, Run, bf16, copied, differences, tensors
from step_kinds import MORE, STEPS, build_kind, rows

from sae_lab.training import capture
from sae_lab.training.capture import CapturedStep, PrepareSteps, set_capturable
from sae_lab.training.step import StepResult

pytestmark = pytest.mark.usefixtures("fixed")


def assert_same_steps(sae_of, **how) -> None:
    eager, captured = Run(sae_of(), None, **how).all(), Run(sae_of(), **how).all()
    assert differences(eager.tensors(), captured.tensors()) == []
    assert captured.step.graphs
    assert all(number.isfinite().all() for row in captured.log for number in row.values())


@pytest.mark.parametrize("kind", STEPS | MORE)
def test_replayed_steps_are_the_eager_ones(kind):
    assert_same_steps(partial(build_kind, kind))


WAYS = {
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True, weight_decay=0.1)},
    "clipped": {"max_grad_norm": 0.05},
    "bf16": {"around": bf16},
    "bf16_clipped": {"around": bf16, "max_grad_norm": 0.05},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu", "route"])
def test_replayed_steps_are_the_eager_ones_however_they_are_taken(kind, way):
    assert_same_steps(partial(build_kind, kind), **WAYS[way])


def test_every_sae_is_among_these_or_says_why_not():
    assert {name for name in SAE_NAMES if not build(name).varying_size} <= {name for _, name, *_ in STEPS.values()}


def test_members_that_take_turns_do_not_disturb_each_other():
    kinds = ("batch_topk", "matryoshka", "vanilla")
    alone = [Run(build_kind(kind), None).all(FEW) for kind in kinds]
    together = [Run(build_kind(kind)) for kind in kinds]
    for i in range(FEW):
        for run in together:
            run.take(i)
    assert [differences(a.tensors(), b.tensors()) for a, b in zip(alone, together, strict=True)] == [[], [], []]


def test_recording_takes_no_step():
    run = Run(build_kind("batch_topk"), record=lambda step, x: recording(step, x))
    seen = []

    def recording(step, x):
        before = copied(tensors(run.step))
        graph = Recorded(step, x)
        seen.append(differences(before, tensors(run.step)))
        return graph

    run.all()
    assert seen == [[], []]


def test_the_backward_pass_is_recorded_as_well():
    W = torch.ones(3, 2, requires_grad=True)

    def run(x):
        (x @ W).relu().sum().backward()
        return StepResult(None, {}, W.grad)

    graph = Recorded(run, torch.zeros(1, 3))
    assert torch.equal(graph.replay(torch.ones(1, 3)).loss, torch.ones(3, 2))
    assert torch.equal(graph.replay(torch.full((1, 3), 2.0)).loss, torch.full((3, 2), 2.0))


def test_a_replay_writes_numbers_but_counts_no_writes():
    total = torch.zeros(3)
    graph = Recorded(lambda x: StepResult(None, {}, total.add_(x)), torch.zeros(3))
    before = total._version
    graph.replay(torch.ones(3))
    assert torch.equal(total, torch.ones(3))
    assert total._version == before


@pytest.mark.parametrize("record", [None, Recorded], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", ["vanilla", "batch_topk"])
def test_one_autocast_context_around_all_steps_is_as_good_as_one_around_each(kind, record):
    """Autocast keeps its casts of weights until the outermost context ends, whether or not the weights change."""
    each = Run(build_kind(kind), None, around=bf16).all(FEW)
    around_all = Run(build_kind(kind), record, before=lambda sae, i: sae.autoencode(rows(sae, 0)))
    with bf16():
        around_all.all(FEW)
    assert differences(each.tensors(), around_all.tensors()) == []


class Rows(L.Callback):
    """Collects what is logged."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append(dict(trainer.callback_metrics))


def fitted(sae, batches, **how):
    rows = Rows()
    module = fit(sae, batches=batches, n_steps=N, callbacks=[rows, PrepareSteps("auto", "auto")], **how)
    return module, rows.rows


@pytest.fixture
def graphs(monkeypatch) -> list[Recorded]:
    """The graphs of steps that Lightning takes."""
    made: list[Recorded] = []

    def record(run, x):
        made.append(Recorded(run, x))
        return made[-1]

    def prepare(step, *_):
        set_capturable(step.optimizer, True)
        return CapturedStep(step, True, record)

    monkeypatch.setattr(capture, "prepare_step", prepare)
    return made


FITTED = {
    "batch_topk": ({}, "sae.k_warmup=5", DEAD),
    "p_anneal": ({"precision": "bf16-mixed"}, "sae.anneal_start=2", "sae.anneal_end=20"),
    "jumprelu": ({"max_grad_norm": 0.05}, "sae.sparsity_warmup=15"),
}


@pytest.mark.parametrize("name", FITTED)
def test_a_captured_run_that_is_stopped_ends_in_the_bits_of_an_eager_one(name, tmp_path, monkeypatch, graphs):
    how, *settings = FITTED[name]
    batches = [planted(32, seed=i)[0] for i in range(N)]
    with monkeypatch.context() as patch:
        patch.setattr(capture, "prepare_step", lambda step, *_: (set_capturable(step.optimizer, True), step)[1])
        whole, log = fitted(build(name, *settings), batches, **how)
    first, log_1 = fitted(build(name, *settings), batches[: N // 2], **how)
    n_first = len(graphs)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = build(name, *settings)
    second, log_2 = fitted(resumed, batches[N // 2 :], ckpt=tmp_path / "half.ckpt", max_epochs=2, **how)
    assert 0 < n_first < len(graphs)
    assert differences(tensors(whole.step) | {"log": log}, tensors(second.step) | {"log": log_1 + log_2}) == []
