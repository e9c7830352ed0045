"""The fused step of Adam against autograd, torch.optim and the separate operations.

The kernel runs on the GPU where there is one, else under Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sae_lab.ops import adam, sparse
from sae_lab.ops.sparse import RowGradient
from sae_lab.ops.unit_norm import divide_by_norm, project_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M = 11
"""Rows of a batch."""


def torch_step(W, exp_avg, exp_avg_sq, gradient, **settings) -> None:
    """The torch form, on a GPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adam, "HAS_TRITON", False)
        adam.adam_step(W, exp_avg, exp_avg_sq, gradient, **settings)


def kernel_step(
    W, exp_avg, exp_avg_sq, gradient, *, lr, step, betas, eps, weight_decay=0.0, decoupled=False, unit_norm, copy=None
) -> None:
    adam_triton = pytest.importorskip("sae_lab.ops.adam_triton", reason="Triton is not installed")
    settings = (lr, step, betas, eps, weight_decay, decoupled, unit_norm, copy)
    adam_triton.adam_step(W, exp_avg, exp_avg_sq, *gradient[:4], *settings)


@pytest.fixture(params=[torch_step, kernel_step])
def take(request):
    return request.param


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Cuts at every 4th entry, and memory that is not initialised holds NaN."""
    if sparse.HAS_TRITON:
        monkeypatch.setattr("sae_lab.ops.sparse_triton.PART", 4)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def narrow(monkeypatch):
    """Rows of more than 64 columns count as wide."""
    if sparse.HAS_TRITON:
        monkeypatch.setattr("sae_lab.ops.adam_triton.WIDEST", 64)
        monkeypatch.setattr("sae_lab.ops.adam_triton.WALK", 64)


def draw_gradient(lengths: list[int], d: int, seed: int = 0, padding: int = 9) -> RowGradient:
    """Factors with so many entries of each latent, and then padding that must not be read."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    indices = torch.randint(M, (n,), generator=generator)
    weights = torch.randn(n, generator=generator)
    return RowGradient(
        torch.tensor([0, *lengths]).cumsum(0).to(DEVICE),
        F.pad(indices, (0, padding), value=2**40).to(DEVICE),
        F.pad(weights, (0, padding), value=float("nan")).to(DEVICE),
        torch.randn(M, d, generator=generator).to(DEVICE),
        padded=True,
    )


def draw_weights(f: int, d: int) -> Tensor:
    return F.normalize(torch.randn(f, d, generator=torch.Generator().manual_seed(9)), dim=-1).to(DEVICE)


def rotate(lengths: list[int], n: int) -> list[int]:
    """Every step has other latents without entries."""
    return lengths[n:] + lengths[:n]


def run(take, lengths, d, optimizer, weight_decay, unit_norm, betas=(0.9, 0.99)) -> list[Tensor]:
    """W and the moments after three steps with a falling learning rate."""
    W = draw_weights(len(lengths), d)
    exp_avg, exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
    for t in (1, 2, 3):
        gradient = draw_gradient(rotate(lengths, t), d, seed=t)
        lr, step = torch.tensor(0.03 / t, device=DEVICE), torch.tensor(float(t), device=DEVICE)
        decoupled = optimizer is torch.optim.AdamW
        take(
            W, exp_avg, exp_avg_sq, gradient, lr=lr, step=step, betas=betas, eps=1e-8,
            weight_decay=weight_decay, decoupled=decoupled, unit_norm=unit_norm,
        )  # fmt: skip
    return [W, exp_avg, exp_avg_sq]


def run_by_autograd(lengths, d, optimizer, weight_decay, unit_norm, betas=(0.9, 0.99)) -> list[Tensor]:
    """The same in float64: the gradient of sum_j weights_j rows_j · W_j by autograd, and torch's optimizer."""
    W = draw_weights(len(lengths), d).double().unsqueeze(1).requires_grad_()
    adam = optimizer([W], lr=0.03, betas=betas, weight_decay=weight_decay)
    for t in (1, 2, 3):
        offsets, indices, weights, rows, _ = draw_gradient(rotate(lengths, t), d, seed=t, padding=0)
        latents = torch.arange(len(lengths), device=DEVICE).repeat_interleave(offsets.diff())
        adam.zero_grad()
        (weights[:, None].double() * rows[indices].double() * W[latents, 0]).sum().backward()
        adam.param_groups[0]["lr"] = 0.03 / t
        if unit_norm:
            project_gradient(W.grad, W, "joint")
        adam.step()
        if unit_norm:
            divide_by_norm(W, "joint")
    return [t.detach()[:, 0] for t in (W, adam.state[W]["exp_avg"], adam.state[W]["exp_avg_sq"])]


RAGGED = [3, 0, 9, 1, 0, 14, 8]
ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize("optimizer", [(ADAM, 0.0), (ADAM, 0.1), (ADAMW, 0.1)], ids=["adam", "decay", "adamw"])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
def test_every_setting_is_that_of_autograd_and_torch(take, optimizer, unit_norm):
    assert_close(run(take, RAGGED, 17, *optimizer, unit_norm), run_by_autograd(RAGGED, 17, *optimizer, unit_norm))


@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize(
    ("lengths", "d"),
    [([33], 130), ([0, 0, 40, 0, 0, 0, 0], 5), ([0] * 7, 5), (RAGGED, 2)],
    ids=["one latent", "one fires", "none fires", "narrow"],
)
def test_every_shape_is_that_of_autograd_and_torch(take, lengths, d, unit_norm):
    settings = (ADAMW, 0.1, unit_norm)
    assert_close(run(take, lengths, d, *settings), run_by_autograd(lengths, d, *settings))


@pytest.mark.parametrize(("d", "unit_norm"), [(130, True), (130, False), (128, True)])
def test_rows_wider_than_the_registers(narrow, d, unit_norm):
    lengths, settings = [2, 0, 9], (ADAM, 0.1, unit_norm)
    assert_close(run(kernel_step, lengths, d, *settings), run_by_autograd(lengths, d, *settings))


def test_rows_of_one_column(take):
    assert_close(run(take, RAGGED, 1, ADAM, 0.0, False), run_by_autograd(RAGGED, 1, ADAM, 0.0, False))
    W, exp_avg, exp_avg_sq = run(take, RAGGED, 1, ADAM, 0.0, True)
    assert torch.equal(W, draw_weights(7, 1))  # a norm of one leaves nothing to learn
    assert max(exp_avg.abs().max(), exp_avg_sq.max()) < 1e-6


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_offsets_and_indices_may_be_int32():
    W, one = draw_weights(7, 17), torch.ones((), device=DEVICE)
    offsets, indices, weights, rows, _ = draw_gradient(RAGGED, 17, padding=0)
    state = [[t.clone() for t in (W, W, W.abs())] for _ in range(2)]
    settings = {"lr": one, "step": one, "betas": (0.9, 0.99), "eps": 1e-8, "unit_norm": True}
    kernel_step(*state[0], RowGradient(offsets, indices, weights, rows), **settings)
    kernel_step(*state[1], RowGradient(offsets.int(), indices.int(), weights, rows), **settings)
    assert all(torch.equal(a, b) for a, b in zip(*state, strict=True))


@pytest.mark.parametrize("d", [17, 70])
def test_one_nan_in_a_gradient_makes_its_whole_row_nan_and_no_other(take, narrow, d):
    W, one = draw_weights(3, d), torch.ones((), device=DEVICE)
    offsets, indices, weights, rows, _ = draw_gradient([2, 5, 9], d)
    rows[M - 1, 3] = float("nan")
    indices = torch.where(torch.arange(len(indices), device=DEVICE) == 3, M - 1, indices.clamp(max=M - 2))
    settings = {"lr": one, "step": one, "betas": (0.9, 0.99), "eps": 1e-8}
    state = (W, torch.zeros_like(W), torch.zeros_like(W))
    take(*state, RowGradient(offsets, indices, weights, rows, padded=True), **settings, unit_norm=True)
    for t in state:
        assert t[1].isnan().all()
        assert t[::2].isfinite().all()


@pytest.mark.parametrize("wide", [False, True], ids=["registers", "wide"])
def test_two_runs_are_equal_to_the_bit(take, wide, request):
    if wide:
        request.getfixturevalue("narrow")
    first, second = (run(take, [2, 0, 9], 70, ADAM, 0.1, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", [ADAM, ADAMW])
@pytest.mark.skipif(DEVICE == "cuda", reason="the torch form of a CPU")
def test_the_torch_form_is_the_separate_operations_to_the_bit(optimizer):
    ours = run(torch_step, RAGGED, 17, optimizer, 0.1, True)
    W = draw_weights(7, 17).unsqueeze(1).requires_grad_()
    separate = optimizer([W], lr=torch.tensor(0.0), betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for t in (1, 2, 3):
        W.grad = sparse.weighted_sums(*draw_gradient(rotate(RAGGED, t), 17, seed=t, padding=0)).unsqueeze(1)
        separate.param_groups[0]["lr"] = torch.tensor(0.03 / t)
        project_gradient(W.grad, W, "joint")
        separate.step()
        divide_by_norm(W, "joint")
    state = separate.state[W]
    for mine, theirs in zip(ours, (W, state["exp_avg"], state["exp_avg_sq"]), strict=True):
        assert torch.equal(mine, theirs[:, 0])


def test_the_kernel_sums_as_weighted_sums_does_to_the_bit(monkeypatch):
    sparse_triton = pytest.importorskip("sae_lab.ops.sparse_triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(sparse_triton._sums, "configs", sparse_triton.SUMS[:1])
    gradient = draw_gradient(RAGGED, 17)
    W = draw_weights(7, 17)
    exp_avg, exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
    one = torch.ones((), device=DEVICE)
    kernel_step(W, exp_avg, exp_avg_sq, gradient, lr=one, step=one, betas=(0.0, 0.9), eps=1e-8, unit_norm=False)
    assert torch.equal(exp_avg, sparse_triton.weighted_sums(*gradient))  # m = g where β1 is 0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99999)], ids=str)
def test_bias_corrections_are_right_at_every_step(take, betas):
    gradient = draw_gradient([0], 1, padding=0)
    for t in (1, 2, 4, 5, 60, 450, 600, 45_000, 70_000, 10_000_000):
        W, exp_avg, exp_avg_sq = (torch.full((1, 1), x, device=DEVICE) for x in (0.0, 0.5, 2.0))
        lr, step = torch.tensor(0.125, device=DEVICE), torch.tensor(float(t), device=DEVICE)
        take(W, exp_avg, exp_avg_sq, gradient, lr=lr, step=step, betas=betas, eps=0.0, unit_norm=False)
        m, v = 0.5 * betas[0] / (1 - betas[0] ** t), 2 * betas[1] / (1 - betas[1] ** t)
        assert W.item() == pytest.approx(-0.125 * m / v**0.5, rel=1e-6)


def test_a_copy_is_the_new_matrix_in_bf16(take, narrow):
    for d, unit_norm in ((17, True), (17, False), (70, True)):
        W, one = draw_weights(3, d), torch.ones((), device=DEVICE)
        exp_avg, exp_avg_sq, copy = (
            torch.zeros_like(W),
            torch.zeros_like(W),
            torch.full_like(W, 9, dtype=torch.bfloat16),
        )
        gradient = draw_gradient([2, 0, 9], d)
        settings = {"lr": one / 8, "step": one, "betas": (0.9, 0.99), "eps": 1e-8}
        take(W, exp_avg, exp_avg_sq, gradient, **settings, unit_norm=unit_norm, copy=copy)
        if DEVICE == "cuda" or take is torch_step:
            assert torch.equal(copy, W.bfloat16())
        else:  # Triton 3.7's interpreter truncates: less than a unit in the last of 8 bits
            assert ((copy - W).abs() < 2**-7 * W.abs()).all()


def test_the_torch_form_asks_the_device_nothing():
    """So that it can be captured: values of fake tensors raise."""
    with FakeTensorMode():
        W, exp_avg, exp_avg_sq, copy = (torch.zeros(3, 6) for _ in range(4))
        indices = torch.zeros(12, dtype=torch.long)
        gradient = RowGradient(
            torch.zeros(4, dtype=torch.long), indices, torch.zeros(12), torch.zeros(5, 6), padded=True
        )
        settings = {"lr": torch.ones(()), "step": torch.ones(()), "betas": (0.9, 0.99), "eps": 1e-8}
        torch_step(W, exp_avg, exp_avg_sq, gradient, **settings, unit_norm=True, copy=copy)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
class TestOnAGPU:
    @pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
    @pytest.mark.parametrize("d", [768, 1003, 2304, 8192, 9216])
    def test_at_size_it_agrees_with_float64_and_with_itself(self, d, unit_norm, monkeypatch):
        monkeypatch.setattr("sae_lab.ops.sparse_triton.PART", 128)
        lengths = [*RAGGED * 40, 0, 3000, 129, 128, 1]
        ours, again = (run(kernel_step, lengths, d, ADAM, 0.0, unit_norm) for _ in range(2))
        assert_close(ours, run_by_autograd(lengths, d, ADAM, 0.0, unit_norm), tolerance=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))

    def test_a_gpus_tensors_go_to_triton(self, monkeypatch):
        called = []
        monkeypatch.setattr("sae_lab.ops.adam_triton.adam_step", lambda *_: called.append(True))
        run(adam.adam_step, [3, 5], 16, ADAM, 0.0, True)
        assert len(called) == 3
