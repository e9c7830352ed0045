"""Captured steps: what is recorded, what is taken eagerly, and that both are the same step.

Graphs are those of recorded_graph.py. That replays are the eager steps, for all SAEs, is in test_recorded_steps.py.
"""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import build, planted
from fitting import BATCHES, fit
from recorded_graph import Recorded

from sae_lab.runtime.errors import UserError
from sae_lab.training import capture
from sae_lab.training.capture import WARM, CapturedStep, PrepareSteps, set_capturable, why_not_captured
from sae_lab.training.python_state import numbers_of
from sae_lab.training.step import TrainingStep


@pytest.fixture
def graphs() -> list[Recorded]:
    """Those that `capturing` makes, in order."""
    return []


@pytest.fixture
def capturing(graphs):
    def capturing(sae) -> CapturedStep:
        def record(run, x):
            graphs.append(Recorded(run, x))
            return graphs[-1]

        return CapturedStep(TrainingStep(sae, adam(sae)), required=True, record=record)

    return capturing


def adam(sae, **options):
    """Adam as training on a GPU prepares it."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True, **options)
    set_capturable(optimizer, True)
    return optimizer


def weights_after(step: TrainingStep, batches=BATCHES):
    for x in batches:
        step(x)
    return {name: value.clone() for name, value in step.sae.state_dict().items()}


def test_one_graph_per_shape_and_plan(fixed, capturing, graphs):
    sae = build("topk", "sae.k_warmup=6", "sae.auxk_coefficient=0")
    step = capturing(sae)
    for x in BATCHES:  # k changes in each of the first six steps
        step(x)
    assert len(graphs) == 1
    assert sum(n for key, n in step.seen.items() if key[-1][1] == 4) == len(BATCHES) - 6
    step(BATCHES[0][:20])  # the last batch of a run: rare, so eager
    assert len(graphs) == 1
    assert sae.steps == len(BATCHES) + 1


def test_the_number_of_dead_latents_chooses_the_graph(fixed, capturing, graphs):
    sae = build("batch_topk", "sae.dead_after=1000")
    step = capturing(sae)
    for n_dead, n_graphs in ((0, 1), (3, 2), (4, 2), (5, 3), (0, 3)):
        for x in BATCHES[: WARM + 1]:
            sae.batches_since_fired.zero_()
            sae.batches_since_fired[:n_dead] = 10**6
            step(x)
        assert len(graphs) == n_graphs


def test_a_step_that_cannot_be_recorded_is_taken_eagerly_and_said(caplog, fixed):
    def refuse(run, x):
        Recorded(run, x)
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("the capture is over")  # as CUDA says when it ends

    sae = build("batch_topk")
    eager = weights_after(TrainingStep(other := copy.deepcopy(sae), adam(other)))
    captured = weights_after(CapturedStep(TrainingStep(sae, adam(sae)), record=refuse))
    assert all(torch.equal(captured[name], value) for name, value in eager.items())
    assert caplog.text.count("recording one failed (operation not permitted when stream is capturing)") == 1
    with pytest.raises(RuntimeError):
        weights_after(CapturedStep(TrainingStep(sae, adam(sae)), required=True, record=refuse))


def test_what_cannot_be_captured_says_why(monkeypatch):
    sae = build("batch_topk")
    monkeypatch.setattr(capture, "HAS_TRITON", True)
    good = adam(sae)
    assert why_not_captured(sae, good) is None
    assert why_not_captured(build("route"), good) is None
    assert why_not_captured(build("pursuit"), good) == "a pursuit keeps as many latents as it needs"
    running = build("batch_topk", "sae.quantile=running")
    assert why_not_captured(running, good) == "with quantile=running any number of latents may be active"
    sgd = torch.optim.SGD(sae.parameters(), lr=0.1)
    assert why_not_captured(sae, sgd) == "SGD has no capturable form"
    monkeypatch.setattr(capture, "HAS_TRITON", False)
    assert why_not_captured(sae, good) == "Triton is not installed"


def test_a_resumed_run_follows_the_schedule_in_updates_by_latent(fixed, tmp_path):
    """Loading a checkpoint replaces the optimizer's groups."""
    options = {"callbacks": [PrepareSteps("auto", "auto")], "enable_checkpointing": False}
    whole = fit(build("topk"), **options)
    fit(build("topk"), batches=BATCHES[:6], **options).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(build("topk"), batches=BATCHES[6:], ckpt=tmp_path / "half.ckpt", max_epochs=2, **options)
    assert whole.step.row_adam.groups
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []


def test_the_key_of_a_graph_does_not_grow_with_the_sae():
    def key(n_latents):
        sae = build("topk", n_latents=n_latents)
        return repr(numbers_of([*sae.modules()], adam(sae)))

    assert len(key(4096)) < len(key(64)) + 10


def test_a_batch_of_other_strides_has_a_graph_of_its_own(fixed, capturing, graphs):
    step = capturing(build("vanilla"))
    for x in [*BATCHES[: WARM + 1], *(x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in BATCHES[: WARM + 1])]:
        step(x)
    assert len(graphs) == 2


def test_there_are_never_many_graphs(fixed, capturing, graphs):
    sae = build("topk", "sae.auxk_coefficient=0")
    step = capturing(sae)
    for size in (*range(10, 10 + capture.MOST + 2), 10 + capture.MOST + 1):
        for _ in range(WARM + 1):
            step(BATCHES[0][:size])
    assert len(graphs) == capture.MOST + 2
    assert len(step.graphs) == 2
    step(BATCHES[0][:10])
    assert len(graphs) == capture.MOST + 3
    assert len(step.graphs) == 3


def test_graphs_after_all_others_are_destroyed_get_a_pool_of_their_own(fixed, capturing, monkeypatch):
    pools, used = itertools.count(), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(capture, "CudaGraph", lambda run, x, pool, stream: (used.append(pool), Recorded(run, x))[1])
    sae = build("topk", "sae.auxk_coefficient=0")
    step = capturing(sae)
    step.stream, step.record = "a stream", step.record_cuda
    monkeypatch.setattr(CapturedStep, "__call__", TrainingStep.__call__)
    for size in (10, 11, 10, 12):
        if size == 12:
            step.graphs.clear()
        for _ in range(WARM + 1):
            step(BATCHES[0][:size])
    assert used == [0, 0, 1]
    others = [SimpleNamespace(graphs={0: None})] * capture.MOST_STEPS
    monkeypatch.setattr(capture, "captured", others)
    step.graphs.clear()
    with pytest.raises(RuntimeError, match="those of 32 SAEs are, and torch has no more streams"):
        step(BATCHES[0][:10])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"capture": True, "products": "auto"}, r"capture=true is impossible, since there is no GPU"),
        ({"capture": "auto", "products": "high"}, r"products=high needs a GPU: give products=auto"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(build("topk"), callbacks=[PrepareSteps(**settings)])


def test_products_are_rounded_only_where_no_language_model_computes_beside(caplog):
    caplog.set_level("INFO")
    data = type("Data", (), {"float32_forward_in_thread": True})()
    choose = capture.choose_products
    assert (choose("auto", False, None), choose("auto", True, None), choose("auto", True, data)) == (
        "highest",
        "high",
        "highest",
    )
    assert choose("medium", True, None) == "medium"
    assert choose("highest", False, data) == "highest"
    with pytest.raises(UserError, match=r"lm\.dtype=bfloat16 or data\.prefetch=false"):
        choose("high", True, data)
    assert "float32 products of training steps: high (tf32)" in caplog.text


def test_a_step_leaves_the_products_of_others_alone():
    sae = build("topk")
    step = TrainingStep(sae, adam(sae))
    step.products, seen = "high", []
    step.forward = lambda sae, x: (seen.append(torch.get_float32_matmul_precision()), sae(x))[1]
    step(BATCHES[0])
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_optimizer_that_was_on_a_gpu_goes_on_on_a_cpu():
    """What a checkpoint of a GPU holds: the rate as a tensor, and `capturable`."""
    sae, x = build("topk"), planted(32)[0]
    optimizer = adam(sae)
    TrainingStep(sae, optimizer)(x)
    optimizer.param_groups[0] |= {"lr": torch.tensor(1e-2), "capturable": True}
    set_capturable(optimizer, False)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(1e-2)
    assert isinstance(group["lr"], float)
    assert group["capturable"] is False
    TrainingStep(sae, optimizer)(x)
    set_capturable(optimizer, True)
    assert isinstance(group["lr"], torch.Tensor)
    assert group["capturable"] is True
