"""Triton's kernels against the torch path: on the GPU where there is one, else under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from sae_lab.ops import sparse
from sae_lab.saes import BatchTopKSAE, TopKSAE

pytest.importorskip("triton", reason="Triton is not installed")
from sae_lab.ops import sparse_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TORCH = {"weighted_sums": sparse.weighted_sums, "dot_products": sparse.dot_products}
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]

LENGTHS = {
    "ragged": [3, 0, 9, 1, 0, 4, 8, 5, 12, 0],
    "long": [2, 50, 0, 7],
    "one": [33],
    "empty": [0, 0, 0],
    "none": [],
}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Cuts at every 4th entry; on a CPU, where nothing can be tuned, the tuner's first configurations."""
    monkeypatch.setattr(sparse_triton, "PART", 4)
    if DEVICE == "cpu":
        use(monkeypatch, 0, 0)


@pytest.fixture
def poison():
    """Memory that is not initialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def use(monkeypatch, sums: int, dots: int) -> None:
    """Leave the tuner one configuration of each kernel."""
    monkeypatch.setattr(sparse_triton._sums, "configs", [sparse_triton.SUMS[sums]])
    monkeypatch.setattr(sparse_triton._dots, "configs", [sparse_triton.DOTS[dots]])


def operands(lengths: list[int], d: int, dtype: torch.dtype, whole: bool = False, m: int = 11) -> tuple[Tensor, ...]:
    """(offsets, indices, weights, left, rows); of small whole numbers, whose sums every order makes exact."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return ((2 * x).round() if whole else x).to(DEVICE, dtype)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    indices = torch.randint(m, (sum(lengths),), generator=generator)
    return offsets.to(DEVICE), indices.to(DEVICE), draw(sum(lengths)), draw(len(lengths), d), draw(m, d)


def exact(offsets: Tensor, indices: Tensor, weights: Tensor, left: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both primitives by their definitions, in float64."""
    segments = torch.arange(len(left), device=DEVICE).repeat_interleave(offsets.diff())
    rows = rows.double()[indices]
    sums = torch.zeros_like(left, dtype=torch.float64).index_add(0, segments, weights.double()[:, None] * rows)
    return sums, (left.double()[segments] * rows).sum(dim=1)


@pytest.mark.parametrize(("d", "dtype"), [(1, DTYPES[0]), (300, DTYPES[0]), *((16, dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_both_primitives_are_their_definitions_to_the_bit(lengths, d, dtype, poison):
    offsets, indices, weights, left, rows = operands(lengths, d, dtype, whole=True)
    sums, dots = exact(offsets, indices, weights, left, rows)
    ours = sparse_triton.weighted_sums(offsets, indices, weights, rows)
    assert ours.dtype == dtype
    assert torch.equal(ours, sums.to(dtype))
    ours = sparse_triton.dot_products(offsets, indices, left, rows)
    assert ours.dtype == dtype
    assert torch.equal(ours, dots.to(dtype))


def test_a_cut_is_where_it_should_be_at_every_length_and_start():
    for before in (0, 1, 6):
        for length in range(10):
            offsets, indices, weights, left, rows = operands([before, length, 5], 2, torch.float32, whole=True)
            sums, dots = exact(offsets, indices, weights, left, rows)
            assert torch.equal(sparse_triton.weighted_sums(offsets, indices, weights, rows), sums.float())
            assert torch.equal(sparse_triton.dot_products(offsets, indices, left, rows), dots.float())


def test_a_sum_does_not_depend_on_where_its_segment_lies():
    offsets, indices, weights, _, rows = operands([3, 23, 5], 40, torch.float32)
    whole = sparse_triton.weighted_sums(offsets, indices, weights, rows)
    alone = sparse_triton.weighted_sums(offsets[1:3] - 3, indices[3:26], weights[3:26], rows)
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tuners_choice_changes_no_bit(dtype, monkeypatch):
    offsets, indices, weights, left, rows = operands([11, 0, 3], 300, dtype)
    results = []
    for i in range(len(sparse_triton.SUMS)):
        use(monkeypatch, i, i % len(sparse_triton.DOTS))
        sums = sparse_triton.weighted_sums(offsets, indices, weights, rows)
        results.append((sums, sparse_triton.dot_products(offsets, indices, left, rows)))
    for sums, dots in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(dots, results[0][1])


def test_the_tuner_chooses_once_for_all_batches_of_a_run(monkeypatch):
    """By a clock of our own, which runs each configuration once."""
    kernels = {sparse_triton._sums: sparse_triton.SUMS, sparse_triton._dots: sparse_triton.DOTS}
    for kernel, configs in kernels.items():
        monkeypatch.setattr(kernel, "configs", configs)
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setitem(kernel.__dict__, "do_bench", lambda call, quantiles: call() or [1.0] * len(quantiles))
    for lengths in ([4, 5, 6], [7, 0, 6], [5, 5, 2]):
        offsets, indices, weights, left, rows = operands(lengths, 5, torch.float32, whole=True)
        sums, dots = exact(offsets, indices, weights, left, rows)
        assert torch.equal(sparse_triton.weighted_sums(offsets, indices, weights, rows), sums.float())
        assert torch.equal(sparse_triton.dot_products(offsets, indices, left, rows), dots.float())
    assert all(len(kernel.cache) == 1 for kernel in kernels)
    sparse_triton.weighted_sums(offsets, indices, weights, rows[:, :3])
    assert len(sparse_triton._sums.cache) == 2


def test_what_the_tuner_knows_a_size_by_is_the_same_for_all_batches():
    def size(n_entries: int, n: int) -> int:
        return sparse_triton.entries_per_segment(torch.empty(n_entries), n)

    assert size(4096 * 32, 12288) == size(4096 * 32 + 1000, 12288) == size(4000 * 32, 12288) == 4
    assert size(4096 * 32, 4096) == 6
    assert size(0, 0) == size(5, 10) == 0


def gradients(sae, x: Tensor, primitives, monkeypatch, precision: torch.dtype | None = None) -> list[Tensor]:
    """x_hat and the gradients of a training step's losses, all primitives of sparse.py replaced."""
    for name in TORCH:
        monkeypatch.setattr(sparse, name, getattr(primitives, name) if primitives is not None else TORCH[name])
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE, precision, enabled=precision is not None):
        out = sae(x)
        loss = torch.stack(list(sae.losses(out).values())).sum() + (out.x_hat * x.detach().cos()).mean()
    return [out.x_hat.detach(), *torch.autograd.grad(loss, [x, *sae.parameters()])]


@pytest.mark.parametrize("sae_class", [BatchTopKSAE, TopKSAE])
@pytest.mark.parametrize(("n_sources", "precision"), [(1, "float64"), (3, "float32"), (3, "autocast")])
def test_an_saes_gradients_are_those_of_the_torch_path(sae_class, n_sources, precision, monkeypatch):
    sae = sae_class(k=3, d_in=7, n_latents=16, n_sources=n_sources, encoder_bias=True, normalize="none")
    sae = sae.double() if precision == "float64" else sae
    sae.b_enc.data.fill_(-0.3)
    sae.W_enc.data[3:6] = 0  # never active
    sae.W_enc.data[9] = 3 * sae.W_enc.data[9].abs()  # and one that nearly always is
    x = torch.randn(16, n_sources, 7, generator=torch.Generator().manual_seed(0)).to(sae.W_enc) + 0.5
    x[4:6] = -3
    sae, x = sae.to(DEVICE), x.to(DEVICE)
    counts = sparse.fire_counts(sae(x).code)
    assert counts.min() == 0
    assert counts.max() > 2 * sparse_triton.PART
    dtype = torch.bfloat16 if precision == "autocast" else None
    theirs = gradients(sae, x, None, monkeypatch, dtype)
    ours, again = (gradients(sae, x, sparse_triton, monkeypatch, dtype) for _ in range(2))
    for mine, expected, twice in zip(ours, theirs, again, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12 if precision == "float64" else 1e-6)
        assert torch.equal(mine, twice)


class TestOnAGPU:
    pytestmark = gpu

    def lengths(self, n: int = 3000) -> list[int]:
        """Like a trained dictionary's: most latents rare, some dead, one on every row."""
        mean = torch.logspace(-2, 2, n, dtype=torch.float64)
        return [*torch.poisson(mean, generator=torch.Generator().manual_seed(0)).long().tolist(), 40000]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("d", [768, 1003])
    def test_tuned_and_at_size_they_agree_with_float64(self, d, dtype, monkeypatch, poison):
        monkeypatch.undo()
        offsets, indices, weights, left, rows = operands(self.lengths(), d, dtype, m=4096)
        sums, dots = exact(offsets, indices, weights, left, rows)
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
        for _ in range(2):
            ours = sparse_triton.weighted_sums(offsets, indices, weights, rows)
            assert (ours - sums).norm() < tolerance * sums.norm()
            ours = sparse_triton.dot_products(offsets, indices, left, rows)
            assert (ours - dots).norm() < tolerance * dots.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_at_size_the_tuners_choice_changes_no_bit(self, dtype, monkeypatch):
        monkeypatch.setattr(sparse_triton, "PART", 128)
        offsets, indices, weights, left, rows = operands(self.lengths(), 768, dtype, m=4096)
        sums, dots = set(), set()
        for i in range(len(sparse_triton.SUMS)):
            use(monkeypatch, i, i % len(sparse_triton.DOTS))
            bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
            sums.add(digest(sparse_triton.weighted_sums(offsets, indices, weights, rows).view(bits)))
            dots.add(digest(sparse_triton.dot_products(offsets, indices, left, rows).view(bits)))
        assert len(sums) == len(dots) == 1

    def test_addresses_may_pass_two_to_the_31(self):
        d = 2**16
        rows = torch.zeros(2**15 + 8, d, dtype=torch.bfloat16, device=DEVICE)
        rows[-1] = 2
        offsets, indices = torch.tensor([0, 1], device=DEVICE), torch.tensor([len(rows) - 1], device=DEVICE)
        weights = torch.ones(1, dtype=torch.bfloat16, device=DEVICE)
        assert (sparse_triton.weighted_sums(offsets, indices, weights, rows) == 2).all()
        assert sparse_triton.dot_products(offsets, indices, rows[-1:], rows).item() == 4 * d

    def test_a_gpus_tensors_go_to_triton(self, monkeypatch):
        offsets, indices, weights, left, rows = operands([3, 5], 16, torch.float32)
        monkeypatch.setattr(sparse_triton, "weighted_sums", lambda *_: "sums")
        monkeypatch.setattr(sparse_triton, "dot_products", lambda *_: "dots")
        assert sparse.weighted_sums(offsets, indices, weights, rows) == "sums"
        assert sparse.dot_products(offsets, indices, left, rows) == "dots"


def digest(bits: Tensor) -> tuple[int, int]:
    """Two checksums that no other result is likely to share."""
    flat = bits.flatten().long()
    return int(flat.sum()), int((flat * torch.arange(len(flat), device=flat.device)).sum())
