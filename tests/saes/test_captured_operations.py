"""Captured steps dispatch only operations of torch whose CUDA implementation was read.

A capture forbids what neither fake tensors nor a CPU show: an implementation that waits for the GPU inside. And a step
is the same in every run only if no implementation adds floats in the order in which threads arrive.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import dictionary
from step_kinds import MORE, STEPS, build_kind, rows
from test_fixed_size import OutsideKernels, take_planned

from sae_lab.ops.rounded import Rounded
from sae_lab.training.capture import prepare_step
from sae_lab.training.step import TrainingStep

READ = {
    "one thread an element; the shape is that of the arguments": """
        abs add addcmul arange bitwise_and cat clamp clamp_max clamp_min clone constant_pad_nd copy diagonal_backward
        div empty_like eq exp floor_divide full full_like ge gt isinf lerp lt masked_fill minimum mul nan_to_num ne neg
        new_empty_strided new_full new_zeros nextafter ones_like pow reciprocal relu rsub scalar_tensor sgn
        slice_backward squeeze stack sub threshold_backward where zeros zeros_like _to_copy _unsafe_view
        _foreach_add _foreach_mul _fused_adam _fused_adamw
    """,
    "reductions of blocks in a fixed order, whose last block adds up the others' results": """
        amin any argmax linalg_vector_norm mean mse_loss sum _foreach_norm
        _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data
    """,
    "cuBLAS, whose workspace torch sets for each stream": "addmm bmm mm _linear_pointwise",
    "gathers, where nothing is added": "gather index index_select",
    "scatters to places that differ, but for one that is cut off (see `true_positions_padded`)": """
        index_add index_copy index_put scatter scatter_add
    """,
    "radix selection and radix sort; their temporary memory is the allocator's": "sort topk",
    "one block a segment, whose offsets are not checked on the host, as lengths are": "segment_reduce",
    "one thread a number, which reads the sorted ones": "searchsorted",
    "a scan, in a fixed order if it is one of integers": "cumsum",
    "nothing on a GPU": "_record_function_enter_new _record_function_exit",
}
"""Names without the _ of operations in place, by the reason why they may be captured. Read in torch 2.11 to 2.13."""

ONLY_IF: dict[str, tuple[str, Callable[..., bool]]] = {
    "cumsum": ("integers", lambda x, *_: not x.is_floating_point()),
    "index": ("positions", lambda x, indices: all(i is None or i.dtype == torch.int64 for i in indices)),
    "index_put": ("positions", lambda x, indices, *_: all(i is None or i.dtype == torch.int64 for i in indices)),
}
"""What an operation must be given, as its other forms need the host or have no fixed order."""


class OnlyRead(OutsideKernels):
    """Raises where an operation outside READ is dispatched, except by what kernels of ours do on a GPU."""

    allowed = frozenset(" ".join(READ.values()).split())

    def dispatched(self, func: Any, args: tuple) -> None:
        name = func.overloadpacket.__name__.rstrip("_")
        assert name in self.allowed, (
            f"a captured step dispatches {func}: read its CUDA implementation first (does it wait for the GPU, is its "
            "order fixed, is there a kernel for the dtype?), then add it to READ."
        )
        what, fits = ONLY_IF.get(name, ("", lambda *_: True))
        assert fits(*args), f"a captured step dispatches {func}, which may be captured for {what} only."


def make(kind: str, dead: bool):
    """An SAE that has taken a step, in one of two forms, which together have every kind of operation."""
    sae = build_kind(kind)
    optimizer = (torch.optim.AdamW if dead else torch.optim.Adam)(sae.parameters(), lr=1e-2, fused=True)
    step = TrainingStep(sae, optimizer, None if dead else 1.0)
    step(rows(sae, 99))
    step.optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)  # as on a GPU
    dictionary(sae).batches_since_fired.zero_()[10:27] = 99 * dead
    step.plans.next()
    return step


def take(step: TrainingStep, monkeypatch, bf16: bool = False) -> None:
    x = rows(step.sae, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), OnlyRead(monkeypatch):
        take_planned(step, x)


@pytest.mark.parametrize("dead", [False, True], ids=["alive, clipped", "some dead, bf16, AdamW"])
@pytest.mark.parametrize("kind", STEPS | MORE)
def test_a_step_dispatches_only_operations_that_were_read(kind, dead, monkeypatch):
    take(make(kind, dead), monkeypatch, bf16=dead)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (torch.median, r"dispatches aten.median.default: read its CUDA implementation first"),
        (torch.bincount, r"dispatches aten.bincount.default: read its CUDA implementation first"),
        (lambda x: x.cumsum(0), r"aten.cumsum.default, which may be captured for integers only"),
        (lambda x: x[x > 0], r"aten.index.Tensor, which may be captured for positions only"),
    ],
)
def test_another_operation_does_not_pass(fault, sentence, monkeypatch):
    step = make("batch_topk", False)
    after = type(step.sae).after_step

    def with_fault(sae):
        after(sae)
        fault(sae.steps if fault is torch.bincount else sae.W_dec.detach().flatten())

    step.sae.__class__ = type("Faulty", (type(step.sae),), {"after_step": with_fault})
    with pytest.raises(AssertionError, match=sentence):
        take(step, monkeypatch)


def weights_on_a_gpu(kind: str, capture: bool, bf16: bool) -> dict[str, torch.Tensor]:
    """The SAE's tensors after steps of which some are replayed, where steps are captured."""
    mine = build_kind(kind).cuda()
    step = TrainingStep(mine, torch.optim.Adam(mine.parameters(), lr=1e-3, fused=True))
    step = prepare_step(step, capture)
    for seed in range(24):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            step(rows(mine, seed).cuda())
    assert bool(getattr(step, "graphs", {})) == capture
    return mine.state_dict()


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in a.items() if not torch.equal(b[name], value)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", STEPS | MORE)
def test_a_gpu_captures_them(kind, bf16, monkeypatch):
    """In bf16 also as steps that round W_enc for each product, and not where it is updated (see ops/rounded.py)."""
    eager = weights_on_a_gpu(kind, False, bf16)
    assert differing(eager, weights_on_a_gpu(kind, True, bf16)) == []
    if bf16:
        monkeypatch.setattr(Rounded, "of", lambda self, W, dtype: W.detach().to(dtype))
        assert differing(eager, weights_on_a_gpu(kind, False, bf16)) == []
