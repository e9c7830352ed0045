"""Selection of a fixed number of entries against selection.py: in torch's form, and by its kernels.

The kernels run on the GPU where there is one, else under Triton's interpreter.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sae_lab.ops import fixed_selection
from sae_lab.ops.selection import select_top_k, select_top_of_batch
from sae_lab.ops.sparse import Pattern, SparseCode

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels(monkeypatch):
    """fixed_selection_triton with blocks so small that loops and cuts happen, and the device that it runs on."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from sae_lab.ops import fixed_selection_triton

    for name, value in {"BLOCK": 64, "LANES": 16, "LIST_BLOCK": 16, "ROWS_BLOCK": 2, "MAX_REST": 2, "ROOM": 2}.items():
        monkeypatch.setattr(fixed_selection_triton, name, value)
    return fixed_selection_triton, "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def form(request, monkeypatch) -> tuple[Callable, Callable, str]:
    """(top_of_batch, top_of_rows, device) of both forms."""
    if request.param == "torch":
        return fixed_selection.top_of_batch_torch, fixed_selection.top_of_rows_torch, "cpu"
    module, device = kernels(monkeypatch)
    return partial(module.top_of_batch, lowered=fixed_selection.LOWERED), module.top_of_rows, device


def draw(case: str, b: int, f: int) -> Tensor:
    generator = torch.Generator().manual_seed(b * f)
    h = torch.randn(b, f, generator=generator)
    return {
        "normal": h,
        "ties": (h * 2).round() / 2,  # holds -0.0 as well
        "equal": torch.ones(b, f),
        "few positive": torch.where(torch.rand(b, f, generator=generator) < 0.05, h.abs(), -h.abs()),
        "none positive": -h.relu(),  # zeros, most of them negative
        "all positive": h.abs() + 0.1,
        "one row": h.abs() * (torch.arange(b) == 1)[:, None],
        "denormal": h * 1e-40,
        "huge": torch.where(h > 1, INF, h * 1e4),
    }[case]


def assert_is(code: SparseCode, expected: SparseCode, n: int) -> None:
    """Assert that the real entries are those expected, in all their bits, and that padding follows."""
    real = len(expected.values)
    assert torch.equal(code.row_offsets.cpu(), expected.row_offsets)
    assert len(code.latents) == len(code.values) == n
    assert code.latents.dtype == code.row_offsets.dtype == torch.int64
    assert code.values.dtype == expected.values.dtype
    assert torch.equal(code.latents[:real].cpu(), expected.latents)
    assert torch.equal(code.values[:real].cpu(), expected.values)
    assert code.n_latents == expected.n_latents
    assert (code.latents[real:] == code.n_latents).all()
    assert (code.values[real:] == 0).all()


def nth_largest(h: Tensor, n: int) -> float:
    """The n-th largest entry, 0 if fewer than n are positive."""
    positive = h[h > 0].float().sort(descending=True).values
    return positive[n - 1].item() if n <= len(positive) else 0.0


def check_batch(top_of_batch: Callable, h: Tensor, n: int, guess: float, device: str) -> None:
    """Compare with selection.py, which knows no NaN; then check the guess for the next batch."""
    lower, known = torch.tensor(guess, device=device), torch.where(h.isnan(), -1, h)
    assert_is(top_of_batch(h.to(device), n, lower), select_top_of_batch([known], n / len(h)), n)
    assert lower.item() == (0.875 * torch.tensor(nth_largest(known, n))).item()


CASES = ["normal", "ties", "equal", "few positive", "none positive", "all positive", "one row", "denormal", "huge"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_entries_are_those_of_selection(case, dtype, form):
    """With bounds of all kinds: too low, about right, too high."""
    top_of_batch, top_of_rows, device = form
    for b, f, n, guess in ((2, 1, 2, 0.7), (1, 17, 5, 0.1), (2, 70, 9, 1.1))[-1 if dtype == torch.float16 else 0 :]:
        h = draw(case, b, f).to(dtype)
        check_batch(top_of_batch, h, n, guess, device)
        k = max(1, n // b)
        assert_is(top_of_rows(h.to(device), k), select_top_k([h], k), k * b)


@pytest.mark.parametrize("f", [1, 40, 150])
def test_all_entries_may_be_selected(f, form):
    b = 1 if f == 150 else 3
    h = draw("normal", b, f)
    check_batch(form[0], h, b * f, 0.0, form[2])
    assert_is(form[1](h.to(form[2]), f), select_top_k([h], f), b * f)


def test_ties_are_kept_from_the_first_row_on(form):
    for n in (1, 11, 17):
        check_batch(form[0], draw("equal", 5, 4), n, 0.5, form[2])


def test_the_guess_never_changes_the_result(form):
    h = draw("normal", 3, 50)
    exact = nth_largest(h, 12)
    for guess in (0.0, -1.0, exact, exact * 1.01, exact * 0.99, nth_largest(h, 3), INF, NAN):
        check_batch(form[0], h, 12, guess, form[2])


def test_one_guess_serves_a_run(form):
    """The guess follows pre-activations that grow and shrink."""
    top_of_batch, _, device = form
    lower = torch.zeros((), device=device)
    for scale in (1, 3, 0.5):
        h = draw("normal", 3, 40) * scale
        assert_is(top_of_batch(h.to(device), 9, lower), select_top_of_batch([h], 3), 9)
        assert lower.item() == (0.875 * torch.tensor(nth_largest(h, 9))).item()


def test_nan_is_not_selected(form):
    top_of_batch, top_of_rows, device = form
    h = draw("normal", 3, 30)
    h[:, ::3] = NAN
    h[1, 1::3] = -NAN
    for dtype in DTYPES[:2]:
        check_batch(top_of_batch, h.to(dtype), 9, 1.0, device)
        expected = select_top_k([torch.where(h.isnan(), -1, h).to(dtype)], 3)
        assert_is(top_of_rows(h.to(device, dtype), 3), expected, 9)
    everywhere = torch.full((2, 5), NAN, device=device)
    assert top_of_batch(everywhere, 3, torch.tensor(0.0, device=device)).row_offsets.tolist() == [0, 0, 0]
    assert top_of_rows(everywhere, 3).latents.tolist() == [5] * 6


def test_there_may_be_fewer_entries_than_asked_for(form):
    top_of_batch, top_of_rows, device = form
    h = draw("normal", 3, 5)
    every = select_top_k([h], 5)
    assert_is(top_of_batch(h.to(device), 40, torch.tensor(0.0, device=device)), every, 40)
    assert_is(top_of_rows(h.to(device), 9), every, 27)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_is_selected_of_nothing(shape):
    h, n = torch.ones(shape, dtype=torch.bfloat16), 0 if shape == (2, 3) else 4
    lower = torch.tensor(0.5)
    code = fixed_selection.top_of_batch(h, n, lower)
    assert_is(code, select_nothing(h), n)
    assert lower == 0.5
    assert_is(fixed_selection.top_of_rows(h, n), select_nothing(h), n * len(h))


def select_nothing(h: Tensor) -> SparseCode:
    offsets = torch.zeros(len(h) + 1, dtype=torch.int64)
    return SparseCode(Pattern(offsets, offsets[:0], h.shape[1]), h.new_zeros(0))


def test_a_slice_of_a_matrix_is_read_where_it_lies(form):
    h = draw("normal", 4, 40)
    check_batch(form[0], h.T[1:], 11, 1.0, form[2])


def test_gradients_do_not_flow_and_h_is_left_alone(form):
    top_of_batch, top_of_rows, device = form
    h = draw("normal", 2, 20).to(device).requires_grad_()
    before = h.detach().clone()
    assert not top_of_batch(h, 4, torch.tensor(0.0, device=device)).values.requires_grad
    assert not top_of_rows(h, 2).values.requires_grad
    assert torch.equal(h, before)


def test_no_shape_depends_on_data_and_the_host_reads_nothing():
    """Under FakeTensorMode tensors hold no data, so either would raise."""
    with FakeTensorMode():
        h, lower = torch.randn(3, 17), torch.zeros(())
        for k in (4, 40):
            batch, rows = fixed_selection.top_of_batch(h, 3 * k, lower), fixed_selection.top_of_rows(h, k)
            for code in (batch, rows):
                assert code.values.shape == code.latents.shape == (3 * k,)
                assert code.row_offsets.shape == (4,)


def test_float64_is_selected_in_torchs_form():
    h = draw("normal", 3, 50).double()
    check_batch(fixed_selection.top_of_batch, h, 9, 0.0, "cpu")
    assert_is(fixed_selection.top_of_rows(h, 3), select_top_k([h], 3), 9)


class TestOnAGPU:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES)
    def test_at_size_the_entries_are_those_of_selection(self, case, dtype):
        h = draw(case, 515, 3000).to(dtype)
        lower = torch.zeros((), device="cuda")
        expected = select_top_of_batch([h], 9), select_top_k([h], 9)
        for _ in range(3):
            assert_is(fixed_selection.top_of_batch(h.cuda(), 515 * 9, lower), expected[0], 515 * 9)
            assert_is(fixed_selection.top_of_rows(h.cuda(), 9), expected[1], 515 * 9)

    def test_a_graph_is_captured_and_replayed(self):
        h, lower = torch.randn(300, 2000, device="cuda"), torch.zeros((), device="cuda")

        def select() -> tuple[SparseCode, SparseCode]:
            return fixed_selection.top_of_batch(h, 2400, lower), fixed_selection.top_of_rows(h, 8)

        select()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch, rows = select()
        for scale in (1, 1.1, 0.5, 4):
            h.normal_().mul_(scale)
            graph.replay()
            assert_is(batch, select_top_of_batch([h.cpu()], 8), 2400)
            assert_is(rows, select_top_k([h.cpu()], 8), 2400)

    def test_addresses_may_pass_two_to_the_31(self):
        h = torch.zeros(2**15 + 8, 2**16, dtype=torch.bfloat16, device="cuda")
        h[-1, -3:] = torch.tensor([1.0, 3.0, 2.0])
        code = fixed_selection.top_of_batch(h, 2, torch.zeros((), device="cuda"))
        assert code.latents.tolist() == [2**16 - 2, 2**16 - 1]
        assert code.row_offsets[-2:].tolist() == [0, 2]
