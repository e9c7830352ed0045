"""What a graph keeps as it was recorded is noticed: by the stand-in for a graph, and by the captured step.

Without the captured step's guards, steps with planted faults differ from the eager ones or cannot be recorded. With
them, captured steps are the eager ones all the same.
"""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from recorded_graph import Recorded
from recorded_runs import FEW, Run, bf16, copied, differences
from step_kinds import build_kind
from torch import nn

from sae_lab.training import capture

pytestmark = pytest.mark.usefixtures("fixed")


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
    monkeypatch.setattr(capture, "numbers_of", lambda *_: None)
    monkeypatch.setattr(capture, "addresses_of", lambda *_: [])
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
    monkeypatch.setattr("recorded_runs.set_capturable", lambda optimizer, on: None)
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
    "to cpu": lambda x: x.detach().to("cpu").sum(),
    "to a device": lambda x: x.to(device=torch.device("cpu")).sum(),
    "to cpu of another type": lambda x: x.double().type("torch.FloatTensor").sum(),
    "new on cpu": lambda x: torch.zeros(x.shape, device="cpu").copy_(x).sum(),
    "as tensor": lambda x: torch.as_tensor(x, device="cpu").sum(),
    "dlpack": lambda x: float(np.from_dlpack(x.detach()).sum()),
    "array": lambda x: float(np.asarray(x.detach()).sum()),
    "__array__": lambda x: float(x.detach().__array__().sum()),
    "print": lambda x: len(repr(x.detach())),
    "format": lambda x: float(f"{x.detach().sum():.3f}"),
    "equal": lambda x: float(torch.equal(x, x)),
    "tensor": lambda x: torch.tensor(2.0),
    "new tensor": lambda x: x.new_tensor([2.0]).sum(),
    "from numpy": lambda x: torch.from_numpy(np.ones(1, np.float32)).to(x.device).sum(),
    "as tensor of numpy": lambda x: torch.as_tensor(np.ones(1, np.float32), device=x.device).sum(),
    "asarray": lambda x: torch.asarray([2.0], device=x.device).sum(),
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


def test_a_number_in_a_list_is_seen():
    def run(record):
        sae = faulty(lambda sae, out: out.x_hat.square().mean() * sae.factors[0])
        sae.factors = [1.0, "unused"]
        run = Run(sae, record)
        for i in range(FEW + 6):
            sae.factors[0] = 2.0 if i > FEW else 1.0
            run.take(i)
        return run

    eager, captured = run(None), run(Recorded)
    assert captured.step.graphs
    assert differences(eager.tensors(), captured.tensors()) == []


def set_a_coefficient(run):
    run.sae.coefficient = 0.5


def stop_training_mode(run):
    run.sae.eval()


def replace_the_data_of_a_parameter(run):
    run.sae.W_enc.data = run.sae.W_enc.data * 2


def write_parameters_from_a_vector(run):
    vector = nn.utils.parameters_to_vector(run.sae.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, run.sae.parameters())


def move_to_another_dtype_and_back(run):
    run.sae.double().float()


def assign_a_state(run):
    run.sae.load_state_dict({name: value * 0.9 for name, value in run.sae.state_dict().items()}, assign=True)


def forget_the_moments(run):
    run.optimizer.state.clear()


def replace_a_moment_between_steps(run):
    state = run.optimizer.state[run.sae.W_dec]
    state["exp_avg"] = state["exp_avg"] * 0.5


def freeze(run):
    run.sae.b_dec.requires_grad_(False)


CHANGES = (
    *(set_the_rate, load_the_moments, set_betas, clip, leave_autocast, set_a_coefficient, stop_training_mode, freeze),
    *(replace_the_data_of_a_parameter, write_parameters_from_a_vector, move_to_another_dtype_and_back),
    *(assign_a_state, forget_the_moments, replace_a_moment_between_steps),
)


@pytest.mark.parametrize("kind", ["jumprelu", "batch_topk"])
@pytest.mark.parametrize("change", CHANGES)
def test_captured_steps_see_what_is_changed_between_two_steps(change, kind):
    if kind == "batch_topk" and change in (set_a_coefficient, stop_training_mode):
        pytest.skip("has no coefficient of its own, and another rule in evaluation")

    def run(record):
        run = Run(build_kind(kind), record, around=bf16)
        for i in range(FEW + 6):
            if i == FEW:
                change(run)
            run.take(i)
        return run

    eager, captured = run(None), run(Recorded)
    assert differences(eager.tensors(), captured.tensors()) == []
