"""Selection against its definition: a stable sort of the whole matrix."""

import pytest
import torch
from torch import Tensor

from sae_lab.ops import selection
from sae_lab.ops.fixed_size import fixed_size
from sae_lab.ops.selection import Preactivations, select_above, select_top_k, select_top_of_batch

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def dense_top_of_batch(h: Tensor, k: float) -> Tensor:
    z = h.relu().flatten()
    kept = z.double().argsort(descending=True, stable=True)[: int(k * len(h))]
    return torch.zeros_like(z).scatter(0, kept, z[kept]).view_as(h)


def dense_top_k(h: Tensor, k: int) -> Tensor:
    kept = h.relu().double().argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(h).scatter(1, kept, h.relu().gather(1, kept))


def random_h(case: str, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n_rows, n_latents = (int(torch.randint(1, n, (), generator=generator)) for n in (90, 150))
    h = torch.randn(n_rows, n_latents, generator=generator)
    if case == "ties":
        h = (h * 2).round() / 2  # holds -0.0 as well
    if case == "mostly negative":
        h = h - 2
    if case == "uneven rows":
        h = h * torch.logspace(-2, 2, n_rows).unsqueeze(1)
    if case == "all negative":
        h = -h.abs() - 1e-3
    return h.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["normal", "ties", "mostly negative", "uneven rows", "all negative"])
def test_selection_is_its_definition_however_h_is_cut(case, dtype):
    for seed in range(25):
        h = random_h(case, seed, dtype)
        k = 1 + seed * h.shape[1] // 30
        for size in (len(h), 7, 1):
            pieces = h.split(size)
            assert torch.equal(select_top_k(pieces, k).to_dense(), dense_top_k(h, k))
            for mean_k in (k, k - 0.37):
                assert torch.equal(select_top_of_batch(pieces, mean_k).to_dense(), dense_top_of_batch(h, mean_k))
            threshold = torch.tensor(0.7351)
            assert torch.equal(select_above(pieces, threshold).to_dense(), h * (h.float() > threshold))


def dense_signed(dense, h: Tensor, k: float) -> Tensor:
    """What a rule keeps of |h|, with the signs of h."""
    return dense(h.abs(), k) * h.sign()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["normal", "ties", "mostly negative", "uneven rows", "all negative"])
def test_signed_selection_is_that_of_absolute_values_however_h_is_cut(case, dtype):
    for seed in range(8):
        h = random_h(case, seed, dtype)
        k, threshold = 1 + seed * h.shape[1] // 30, torch.tensor(0.7351)
        for pieces in ([h], h.split(7)):
            assert torch.equal(select_top_k(pieces, k, signed=True).to_dense(), dense_signed(dense_top_k, h, k))
            batch = select_top_of_batch(pieces, k - 0.37, signed=True)
            assert torch.equal(batch.to_dense(), dense_signed(dense_top_of_batch, h, k - 0.37))
            above = select_above(pieces, threshold, signed=True)
            assert torch.equal(above.to_dense(), h * (h.abs().float() > threshold))
            assert (above.values != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["normal", "ties", "all negative"])
def test_signed_selection_of_a_fixed_size_is_the_same_with_padding(case, dtype):
    h = random_h(case, 3, dtype)
    h[:3] = 0
    for rule, k in ((select_top_k, 5), (select_top_of_batch, h.shape[1] - 0.5)):
        plain = rule([h], k, signed=True)
        with fixed_size():
            padded = rule([h], k, signed=True)
        assert torch.equal(padded.to_dense(), plain.to_dense())
        assert len(padded.values) > len(plain.values)
        assert (padded.values[len(plain.values) :] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["normal", "ties", "mostly negative", "all negative"])
def test_a_gpu_selects_what_a_cpu_does(case, dtype):
    for seed in range(10):
        h = random_h(case, seed, dtype)
        k = 1 + seed * h.shape[1] // 30
        for rule, bound in ((select_top_k, k), (select_top_of_batch, k - 0.37), (select_above, torch.tensor(0.7351))):
            cpu = rule([h], bound)
            cuda = rule([h.cuda()], bound.cuda() if isinstance(bound, torch.Tensor) else bound)
            assert torch.equal(cuda.latents.cpu(), cpu.latents)
            assert torch.equal(cuda.row_offsets.cpu(), cpu.row_offsets)
            assert torch.equal(cuda.values.cpu(), cpu.values)


def test_a_row_of_many_equal_entries_keeps_the_first():
    h = torch.ones(3, 100)
    h[1, 60] = 2
    assert select_top_k([h], 3).latents.tolist() == [0, 1, 2, 0, 1, 60, 0, 1, 2]
    assert select_top_of_batch([h], 1).to_dense().nonzero().tolist() == [[0, 0], [0, 1], [1, 60]]


def test_a_row_of_negative_zeros_keeps_its_positive_entries():
    h = torch.tensor([[1.0, -0.0, -0.0, -0.0], [-0.0, -0.0, 0.0, 2.0]])
    for dtype in DTYPES:
        assert select_top_k([h.to(dtype)], 3).values.tolist() == [1, 2]


def test_a_threshold_that_the_dtype_lacks_divides_as_it_stands():
    h = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)  # neighbours in bfloat16
    for threshold, n in ((0.9999, 2), (1.0, 1), (1.006, 1), (1.0078125, 0), (-3.0, 2)):
        assert len(select_above([h], torch.tensor(threshold)).values) == n


class Counted:
    """Pieces that count how often they are walked."""

    def __init__(self, pieces):
        self.pieces, self.walks = pieces, 0

    def __iter__(self):
        self.walks += 1
        return iter(self.pieces)


@pytest.mark.parametrize(("scale", "walks"), [(1.0, 1), (1.7, 2), (50.0, 2)])
def test_a_first_piece_unlike_the_others_costs_a_walk_and_nothing_else(scale, walks):
    h = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    h[:100] *= scale
    pieces = Counted(h.split(100))
    assert torch.equal(select_top_of_batch(pieces, 2).to_dense(), dense_top_of_batch(h, 2))
    assert pieces.walks == walks


def test_preactivations_are_the_product_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(1300, 24, generator=generator), torch.randn(64, 24, generator=generator)
    bias = torch.randn(64, generator=generator)
    whole = torch.cat(list(Preactivations(x, W, bias)))
    monkeypatch.setitem(selection.PIECE, "cpu", 1)
    pieces = list(Preactivations(x, W, bias))
    assert [len(piece) for piece in pieces] == [434, 433, 433]
    torch.testing.assert_close(whole, x @ W.T + bias)
    assert torch.equal(torch.cat(pieces), whole)


def test_preactivations_follow_autocast_in_float32_only():
    x, W = torch.randn(3, 5), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert [h.dtype for h in Preactivations(x, W, None)] == [torch.bfloat16]
        assert [h.dtype for h in Preactivations(x.double(), W.double(), None)] == [torch.float64]
