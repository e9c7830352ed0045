"""Training steps in fixed-size mode: the numbers of the other mode, no shape that depends on data, no host reads.

That nothing is copied between host and GPU either, test_recorded_steps.py shows, where steps are recorded.
"""

import copy
from collections import Counter

import pytest
import torch
from conftest import build, dictionary, planted
from step_kinds import STEPS, build_kind, rows
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lab.ops import selection, sparse
from sae_lab.ops.fixed_size import fixed_size, true_positions_padded
from sae_lab.ops.sparse import keep_first_latents, l0_per_row, split_by_group
from sae_lab.training import row_adam
from sae_lab.training.row_adam import adam_step
from sae_lab.training.step import TrainingStep

LARGE = 4096
HOST_READS = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)


def make(kind: str):
    """An SAE with some latents dead, which has taken one step, so that it has a scale, and its step."""
    sae = build_kind(kind)
    step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    step(rows(sae, 99))
    dictionary(sae).batches_since_fired[10:27] = 99
    return step


def take(step: TrainingStep, x, mode: bool):
    plan = step.plans.next()
    with fixed_size(mode):
        return step.run(x, plan)


@pytest.mark.parametrize("kind", STEPS)
def test_both_modes_take_the_same_steps(kind, monkeypatch):
    """To rounding: sums over the entries of a latent and of the batch run in another order."""
    steps = make(kind), make(kind)
    for seed in range(6):
        losses = [take(step, rows(step.sae, seed), mode).terms for step, mode in zip(steps, (False, True), strict=True)]
        for name, term in losses[0].items():
            torch.testing.assert_close(losses[1][name], term, rtol=1e-5, atol=1e-7)
    mine, theirs = (step.sae.state_dict() for step in steps)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=2e-6)


def fake(step: TrainingStep, mode: FakeTensorMode) -> TrainingStep:
    """The same step on tensors without numbers."""
    known: dict[int, torch.Tensor] = {}

    def convert(tensor):
        if id(tensor) not in known:
            without = mode.from_tensor(tensor.detach())
            parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(without, tensor.requires_grad) if parameter else without
        return known[id(tensor)]

    sae = copy.deepcopy(step.sae)
    for part in sae.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: convert(tensor) for name, tensor in tensors.items() if tensor is not None})
    with mode:
        return TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=torch.tensor(1e-2), capturable=False))


def trace(step: TrainingStep) -> None:
    """Take a step in fixed-size mode on tensors without numbers, in which nothing can be read.

    On a batch as large as those of training, which costs nothing here: other tests take the same steps, and refuse the
    same, on 48 rows. A branch that only batches of other sizes take is not seen.
    """
    mode = FakeTensorMode()
    step.plans.next()
    without = fake(step, mode)
    x = mode.from_tensor(rows(step.sae, 0)[:1].expand(LARGE, -1, -1))
    with mode:
        take_planned(without, x)


def take_planned(step: TrainingStep, x) -> None:
    with fixed_size():
        step.run(x, None)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_reads_nothing_back_and_no_shape_depends_on_data(kind):
    trace(make(kind))


def read_a_number(out):
    return out.x_hat.sum().item()


def find_positions(out):
    return out.x_hat.sum() + out.x_hat.nonzero().shape[0]


def select_by_mask(out):
    return out.x_hat[out.x_hat > 0].sum()


def branch_on_data(out):
    return out.x_hat.sum() if out.x_hat.sum() > 0 else -out.x_hat.sum()


def leave_for_numpy(out):
    return out.x_hat.sum() + float(out.x_hat.detach().numpy().sum())


def read_memory(out):
    return out.x_hat.sum() + out.x_hat.untyped_storage()[0]


def read_large_batches(out):
    return read_a_number(out) if len(out.x_hat) > 1000 else out.x_hat.sum()


FAULTS = [
    *(read_a_number, find_positions, select_by_mask, branch_on_data),
    *(leave_for_numpy, read_memory, read_large_batches),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["batch_topk", "gated", "route"])
def test_what_needs_the_host_does_not_pass_the_check(kind, fault):
    step = make(kind)
    losses = type(step.sae).losses

    def with_fault(sae, out):
        return losses(sae, out) | {"fault": 0 * fault(out) + out.x_hat.sum()}

    step.sae.__class__ = type("Faulty", (type(step.sae),), {"losses": with_fault})
    with pytest.raises(HOST_READS):
        trace(step)


@pytest.mark.parametrize("kind", STEPS)
def test_no_tensor_is_made_on_another_device(kind):
    """A capture cannot copy from the host. Here the default device is another one, as a CPU is beside a GPU."""
    step = make(kind)
    step.plans.next()
    x = rows(step.sae, 0)
    with torch.device("meta"):
        take_planned(step, x)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_changes_nothing_but_numbers_in_their_places(kind):
    """A replay changes no Python attribute and reads and writes the addresses that were recorded."""
    step = make(kind)
    take(step, rows(step.sae, 0), mode=True)
    plan = step.plans.next()

    def places():
        tensors = [*step.sae.parameters(), *step.sae.buffers()]
        tensors += [value for state in step.optimizer.state.values() for value in state.values()]
        plain = [vars(part)[name] for part in step.sae.modules() for name in sorted(vars(part))]
        return [t.data_ptr() for t in tensors], [v for v in plain if isinstance(v, int | float | str)]

    before = places()
    with fixed_size():
        step.run(rows(step.sae, 1), plan)
    assert places() == before


class OutsideKernels(TorchDispatchMode):
    """Base of modes that see the operations of a GPU's step, without views and what kernels of ours do there."""

    LAUNCHES = {
        (selection, "top_of_batch"): 9,
        (selection, "top_of_rows"): 4,
        (sparse, "weighted_sums"): 2,
        (sparse, "dot_products"): 1,
        (row_adam, "adam_step"): 2,
    }

    def __init__(self, monkeypatch):
        super().__init__()
        self.ours = False
        for (module, name), launches in self.LAUNCHES.items():
            monkeypatch.setattr(module, name, self.as_kernels(name, getattr(module, name), launches))

    def as_kernels(self, name, function, launches):
        def run(*args, **kwargs):
            before, self.ours = self.ours, True
            try:
                return function(*args, **kwargs)
            finally:
                self.ours = before
                if not self.ours:
                    self.launched(name, launches)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.ours and not func.is_view:
            self.dispatched(func, args)
        return func(*args, **(kwargs or {}))

    def dispatched(self, func, args):
        """See an operation."""

    def launched(self, name, n):
        """See the n kernels of ours that one function launches."""


class Count(OutsideKernels):
    """Counts the operations and the kernels of ours."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.counts = Counter()

    def dispatched(self, func, args):
        self.counts[str(func)] += 1

    def launched(self, name, n):
        self.counts[name] += n


MOST_OPERATIONS = {
    "batch_topk": (95, 200),
    "topk": (75, 180),
    "abs_topk": (80, 185),
    "matryoshka": (235, 315),
    "hierarchical_topk": (130, 235),
    "route": (125, 230),
    "vanilla": (95, 95),
    "jumprelu": (135, 205),
    "gated": (140, 140),
}
"""In a step without and with dead latents."""


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "some dead"])
@pytest.mark.parametrize("kind", MOST_OPERATIONS)
def test_a_step_dispatches_a_bounded_number_of_operations(kind, dead, monkeypatch):
    """A graph's replay takes a microsecond or more for each, whatever it computes."""
    step, count = make(kind), Count(monkeypatch)
    if not dead:
        dictionary(step.sae).batches_since_fired.zero_()
    step.plans.next()
    x = rows(step.sae, 0)
    with count:
        take_planned(step, x)
    n = count.counts.total()
    print(f"{kind}: {n} operations")
    assert n <= MOST_OPERATIONS[kind][dead]


def test_padded_codes_split_and_count_as_others_do():
    sae, x = build("batch_topk").train(), planted(48)[0]
    with torch.no_grad():
        plain = sae(x).code
        with fixed_size():
            padded = sae(x).code
    assert padded.pattern.padded
    assert not plain.pattern.padded
    assert torch.equal(padded.to_dense(), plain.to_dense())
    assert torch.equal(l0_per_row(padded), l0_per_row(plain))
    assert torch.equal(padded.pattern.fire_counts, plain.pattern.fire_counts)
    for mine, theirs in zip(split_by_group(padded, [8, 24, 32]), split_by_group(plain, [8, 24, 32]), strict=True):
        assert len(mine.values) == len(padded.values)
        assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert torch.equal(keep_first_latents(padded, 8).to_dense(), keep_first_latents(plain, 8).to_dense())


def test_fewer_positive_entries_than_slots_leave_padding():
    sae, x = build("batch_topk", "sae.encoder_bias=true").train(), planted(48)[0]
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
        plain = sae(x).code
        with fixed_size():
            padded = sae(x).code
    assert len(plain.values) < len(padded.values) == 4 * 48
    assert torch.equal(padded.to_dense(), plain.to_dense())
    assert (padded.latents[len(plain.values) :] == 64).all()
    assert (padded.values[len(plain.values) :] == 0).all()


@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_true_positions_padded(n):
    mask = torch.tensor([False, True, True, False, True, False])
    assert true_positions_padded(mask, n).tolist() == ([1, 2, 4] + 5 * [6])[:n]


BY_LATENT = {
    "batch_topk": 2,
    "topk": 2,
    "crosscoder": 2,
    "transcoder": 2,
    "warmup": 2,
    "auxk_of_batch": 2,
    "centred": 2,
    "abs_topk": 2,
    "abs_batch_topk": 2,
    "hierarchical_topk": 2,
    "all_budgets": 2,
    "l1": 2,
    "l1_free_norms": 1,
}
BY_LATENT |= {"starts": 2, "matryoshka": 1, "abs_matryoshka": 1, "temporal": 0, "route": 2}
"""How many of W_enc and W_dec are updated by latent, in steps without dead latents at least."""


@pytest.mark.parametrize("kind", STEPS)
def test_updates_by_latent_are_those_of_the_optimizer(kind, monkeypatch):
    steps, updated = (make(kind), make(kind)), []
    steps[1].row_adam.groups = {}
    monkeypatch.setattr(row_adam, "adam_step", lambda W, *a, **k: (updated.append(W.data_ptr()), adam_step(W, *a, **k)))
    for seed in range(6):
        for step in steps:
            take(step, rows(step.sae, seed), mode=True)
    assert len(set(updated)) == BY_LATENT.get(kind, 0)
    mine, theirs = (step.sae.state_dict() for step in steps)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)
    moments = [step.optimizer.state_dict()["state"] for step in steps]
    for i, state in moments[1].items():
        for name, value in state.items():
            torch.testing.assert_close(moments[0][i][name], value, rtol=1e-4, atol=1e-7)
