"""Steps that are recorded and replayed are the eager ones to the bit, and a step that a graph would change is noticed.

The graphs are those of recorded_graph.py, so this needs no GPU.
"""

import re
from contextlib import nullcontext
from functools import partial

import lightning as L
import pytest
import torch
from conftest import SAE_NAMES, build, dictionary, equal, planted
from fitting import DEAD, fit
from recorded_graph import Recorded
from step_kinds import MORE, STEPS, build_kind, rows
from torch.utils._pytree import tree_map_only

from sae_lab.ops.sparse import fire_counts
from sae_lab.training import capture
from sae_lab.training.capture import CapturedStep, PrepareSteps, set_capturable
from sae_lab.training.module import training_row
from sae_lab.training.step import TrainingStep

N, FEW = 24, 10
"""Steps. Four without dead latents, four with them, and so on."""
ADAM = partial(torch.optim.Adam, lr=1e-2, fused=True)


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """Steps on a CPU in fixed-size mode, as on a GPU."""
    monkeypatch.setattr("sae_lab.training.step.has_fixed_size", lambda x: True)


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


def copied(tree):
    return tree_map_only(torch.Tensor, torch.clone, tree)


def test_the_backward_pass_is_recorded_as_well():
    W = torch.ones(3, 2, requires_grad=True)

    def run(x):
        (x @ W).relu().sum().backward()
        return capture.StepResult(None, {}, W.grad)

    graph = Recorded(run, torch.zeros(1, 3))
    assert torch.equal(graph.replay(torch.ones(1, 3)).loss, torch.ones(3, 2))
    assert torch.equal(graph.replay(torch.full((1, 3), 2.0)).loss, torch.full((3, 2), 2.0))


@pytest.mark.parametrize("record", [None, Recorded], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", ["vanilla", "batch_topk"])
def test_one_autocast_context_around_all_steps_is_as_good_as_one_around_each(kind, record):
    """Autocast keeps its casts of weights until the outermost context ends, whether or not the weights change."""
    each = Run(build_kind(kind), None, around=bf16).all(FEW)
    around_all = Run(build_kind(kind), record, before=lambda sae, i: sae.autoencode(rows(sae, 0)))
    with bf16():
        around_all.all(FEW)
    assert differences(each.tensors(), around_all.tensors()) == []


def count_calls(sae, out):
    sae.calls = vars(sae).get("calls", 0) + 1
    return out.x_hat.mean() / sae.calls


def use_a_number_from_outside(sae, out):
    return out.x_hat.mean() * sae.factor


def replace_a_buffer(sae, out):
    sae.n_seen = sae.n_seen + 1
    return out.x_hat.mean() / sae.n_seen


def keep_a_tensor(sae, out):
    kept, sae.kept = vars(sae).get("kept", 0), out.x_hat.detach().mean()
    return out.x_hat.mean() * kept


def replace_data(sae, out):
    sae.b_dec.data = sae.b_dec.data * 0.9
    return out.x_hat.mean()


def replace_a_moment(sae, out):
    for state in sae.moments.values():
        state["exp_avg"] = state["exp_avg"] * 0.5
    return out.x_hat.mean()


def faulty(term, kind="batch_topk"):
    """An SAE with one more term of the loss."""
    sae = build_kind(kind)
    losses = type(sae).losses
    members = {"losses": lambda sae, out: losses(sae, out) | {"fault": term(sae, out)}}
    sae.__class__ = type("Faulty", (type(sae),), members)
    sae.register_buffer("n_seen", torch.ones(()), persistent=False)
    sae.factor = 1.0
    return sae


def change_the_factor(sae, i):
    sae.factor = 1 / (1 + i)


@pytest.fixture
def unguarded(monkeypatch):
    """Steps are captured whatever they depend on."""
    monkeypatch.setattr(capture, "baked_in", lambda *_: None)
    monkeypatch.setattr(capture, "refuse_replacements", lambda *_: nullcontext())


REPLACING = {
    replace_a_buffer: "n_seen",
    keep_a_tensor: "kept",
    replace_data: r"the memory of a \(1, 16\) tensor",
    replace_a_moment: "exp_avg",
}


@pytest.mark.parametrize("fault", [count_calls, use_a_number_from_outside, *REPLACING])
def test_what_a_graph_does_not_see_is_a_difference(fault, unguarded):
    eager, captured = (Run(faulty(fault), record, before=change_the_factor).all(FEW) for record in (None, Recorded))
    assert differences(eager.tensors(), captured.tensors())


@pytest.mark.parametrize("fault", [count_calls, use_a_number_from_outside])
def test_a_number_that_changes_by_the_step_makes_it_eager(fault, monkeypatch):
    monkeypatch.setattr(capture, "MOST_SEEN", 3)
    eager, captured = (Run(faulty(fault), record, before=change_the_factor).all(FEW) for record in (None, Recorded))
    assert differences(eager.tensors(), captured.tensors()) == []
    assert not captured.step.graphs
    assert len(captured.step.seen) == 3


@pytest.mark.parametrize("fault", REPLACING)
def test_a_step_that_replaces_a_tensor_is_eager(fault, caplog):
    eager, captured = (Run(faulty(fault), record, required=False).all(FEW) for record in (None, Recorded))
    assert differences(eager.tensors(), captured.tensors()) == []
    assert re.search(f"not captured any more.*a step replaces .*{REPLACING[fault]}", caplog.text)


def test_a_rate_that_is_no_tensor_is_a_difference(monkeypatch, unguarded):
    monkeypatch.setitem(globals(), "set_capturable", lambda optimizer, on: None)
    eager, captured = (Run(build_kind("vanilla"), record).all(FEW) for record in (None, Recorded))
    assert "/optimizer/0/exp_avg" in differences(eager.tensors(), captured.tensors())


class Same(Recorded):
    """Returns one object again and again, with what was derived from an earlier replay."""

    def replay(self, x):
        super().replay(x)
        return self.result


def test_what_was_derived_from_an_earlier_result_is_a_difference():
    eager, captured = (Run(build_kind("batch_topk"), record).all() for record in (None, Same))
    assert differences(eager.tensors(), captured.tensors())


def test_casts_from_before_a_recording_are_a_difference(monkeypatch):
    each = Run(build_kind("vanilla"), None, around=bf16).all(FEW)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    around_all = Run(build_kind("vanilla"))
    with bf16():
        around_all.all(FEW)
    assert differences(each.tensors(), around_all.tensors())


NEEDS_THE_HOST = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "nonzero": lambda x: x.nonzero().sum(),
    "mask": lambda x: x[x > 0].sum(),
    "write by mask": lambda x: x.detach().index_put((x[:, 0, 0].isfinite(),), x).sum(),
    "numpy": lambda x: float(x.detach().numpy().sum()),
    "tolist": lambda x: x.tolist()[0][0][0],
    "cpu": lambda x: x.cpu().sum(),
    "equal": lambda x: float(torch.equal(x, x)),
    "tensor": lambda x: torch.tensor(2.0),
    "random": lambda x: torch.rand_like(x).sum(),
}


@pytest.mark.parametrize("name", NEEDS_THE_HOST)
def test_what_needs_the_host_is_not_recorded(name):
    run = Run(faulty(lambda sae, out: out.x_hat.mean() * NEEDS_THE_HOST[name](out.x_hat)))
    with pytest.raises(RuntimeError, match="when a step is recorded"):
        run.all(FEW)


def test_a_step_that_cannot_be_recorded_is_taken_eagerly():
    """What the recording did until it failed leaves no trace."""
    eager, captured = (
        Run(faulty(lambda sae, out: out.x_hat.mean() * float(sae.steps)), record, around=bf16, required=False).all(FEW)
        for record in (None, Recorded)
    )
    assert captured.step.failed
    assert differences(eager.tensors(), captured.tensors()) == []


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


def set_the_rate(run):
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3


def load_the_moments(run):
    run.optimizer.load_state_dict(copied(run.optimizer.state_dict()))


def set_betas(run):
    run.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def clip(run):
    run.step.max_grad_norm = 0.01


def leave_autocast(run):
    run.around = nullcontext


def set_a_coefficient(run):
    run.sae.coefficient = 0.5


def stop_training_mode(run):
    run.sae.eval()


@pytest.mark.parametrize(
    "change", [set_the_rate, load_the_moments, set_betas, clip, leave_autocast, set_a_coefficient, stop_training_mode]
)
def test_captured_steps_see_what_is_changed_between_two_steps(change):
    def run(record):
        run = Run(build_kind("jumprelu"), record, around=bf16)
        for i in range(FEW + 6):
            if i == FEW:
                change(run)
            run.take(i)
        return run

    eager, captured = run(None), run(Recorded)
    assert differences(eager.tensors(), captured.tensors()) == []
