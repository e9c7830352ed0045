"""Sparse codes against dense ones: every number and every gradient."""

import pytest
import torch
from torch import Tensor

from sae_lab.ops import losses, selection, sparse
from sae_lab.ops.selection import select_top_of_batch
from sae_lab.ops.sparse import Pattern, SparseCode, keep_first_latents, split_by_group
from sae_lab.saes import BatchTopKSAE, TopKSAE

SIZES = {"d_in": 7, "n_latents": 24, "normalize": "none"}


def rows(n: int = 30, n_sources: int = 1, seed: int = 0, d_in: int = 7) -> Tensor:
    return torch.randn(n, n_sources, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_code(n_rows: int = 9, n_latents: int = 12, k: float = 3) -> SparseCode:
    h = torch.randn(n_rows, n_latents, generator=torch.Generator().manual_seed(0))
    h[4] = -1
    return select_top_of_batch([h], k)


def test_a_code_knows_its_dense_form():
    code = SparseCode(Pattern(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 0]), 4), torch.tensor([5.0, 6.0, 7.0]))
    assert code.shape == (3, 4)
    assert code.to_dense().tolist() == [[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 0]]
    assert code.pattern.rows.tolist() == [0, 0, 2]


def test_to_dense_lets_gradients_through():
    code = random_code()
    code = SparseCode(code.pattern, code.values.requires_grad_())
    weights = torch.rand(code.shape)
    (code.to_dense() * weights).sum().backward()
    assert torch.equal(code.values.grad, weights[code.to_dense() != 0])


@pytest.mark.parametrize("k", [3, 0.01], ids=["some", "none"])
def test_statistics_of_a_code_do_not_depend_on_its_form(k):
    code = random_code(k=k)
    dense = code.to_dense()
    for statistic in (sparse.l0_per_row, sparse.fire_counts, sparse.fired_latents, sparse.smallest_active, losses.l1):
        torch.testing.assert_close(statistic(code), statistic(dense))


def test_entries_in_order_of_latents():
    code = random_code(60, 12, 4)
    entries = code.pattern.by_latent
    latents, rows = code.to_dense().T.nonzero().unbind(1)
    assert torch.equal(entries.sort(code.latents), latents)
    assert torch.equal(entries.rows, rows)
    assert torch.equal(entries.offsets.diff(), sparse.fire_counts(code))
    assert torch.equal(entries.unsort(entries.sort(code.values)), code.values)


def test_stable_argsort_is_torchs():
    keys = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparse.stable_argsort(keys), keys.argsort(stable=True))


def cases():
    """SAEs whose codes have ragged, empty and no rows; rows of which every pre-activation is negative."""
    for n_sources in (1, 3):
        for bias in (None, -0.3, -50.0):
            for cls, k in ((BatchTopKSAE, 2.5), (TopKSAE, 3)):
                yield pytest.param(cls, k, n_sources, bias, id=f"{cls.__name__}-s{n_sources}-bias{bias}")


@pytest.mark.parametrize(("cls", "k", "n_sources", "bias"), cases())
def test_gradients_are_those_of_the_dense_formula(cls, k, n_sources, bias):
    sae = cls(k=k, n_sources=n_sources, encoder_bias=bias is not None, **SIZES).double()
    x = rows(n_sources=n_sources).requires_grad_()
    with torch.no_grad():
        sae.b_dec.copy_(rows(1, n_sources, seed=1)[0])
        if bias is not None:
            sae.b_enc.copy_(bias + 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(2)))
        sae.W_enc.add_(0.4)
        x[5:8] = sae.b_dec - 2  # away from every latent
    out = sae(x)
    mask = out.code.to_dense() != 0
    l0 = mask.sum(1)
    assert bias == -50 or (l0.min() == 0 and l0.max() > l0.min())
    parameters = [x, *sae.parameters()]
    weights = rows(n_sources=n_sources, seed=3)
    loss = losses.mse(weights, out.x_hat).double() + (out.x_hat * weights).mean() + losses.l1(out.code)
    ours = torch.autograd.grad(loss, parameters)

    centred = (x - sae.b_dec).flatten(1)
    h = centred @ sae.W_enc.flatten(1).T + (0 if sae.b_enc is None else sae.b_enc)
    z = h.relu() * mask
    x_hat = (z @ sae.W_dec.flatten(1)).view_as(x) + sae.b_dec
    dense_loss = losses.mse(weights, x_hat).double() + (x_hat * weights).mean() + losses.l1(z)
    reference = torch.autograd.grad(dense_loss, parameters)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=0, atol=1e-12)
    for mine, theirs in zip(ours, reference, strict=True):
        assert (mine - theirs).abs().max() < 1e-10


@pytest.mark.parametrize(("cls", "k"), [(BatchTopKSAE, 4), (TopKSAE, 4)])
def test_no_dense_code_is_kept_for_the_backward_pass(cls, k):
    sae, kept = cls(k=k, d_in=8, n_latents=512), []
    x = torch.randn(400, 1, 8)

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = sae(x)
        loss = torch.stack(list(sae.losses(out).values())).sum()
    assert max(t.numel() for t in kept) <= max(sae.W_enc.numel(), x.numel())
    loss.backward()
    assert sae.W_enc.grad.norm() > 0


def train(sae, n_steps: int = 4) -> list[Tensor]:
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    for i in range(n_steps):
        loss = torch.stack(list(sae.losses(sae(rows(600, seed=i).float())).values())).sum()
        adam.zero_grad()
        loss.backward()
        sae.before_step()
        adam.step()
        sae.after_step()
    return [t.detach().clone() for t in sae.state_dict().values()]


@pytest.mark.parametrize(("cls", "k"), [(BatchTopKSAE, 4), (TopKSAE, 4)])
def test_two_runs_are_equal_to_the_bit_and_pieces_change_nothing(cls, k, monkeypatch):
    runs = [train(cls(k=k, auxk_coefficient=1.0, dead_after=1, **SIZES)) for _ in range(2)]
    monkeypatch.setitem(selection.PIECE, "cpu", 1)
    runs.append(train(cls(k=k, auxk_coefficient=1.0, dead_after=1, **SIZES)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("cls", "k"), [(BatchTopKSAE, 4), (TopKSAE, 4)])
def test_under_autocast_the_product_is_bf16_and_all_else_float32(cls, k):
    sae = cls(k=k, d_in=32, n_latents=128)
    x = rows(256, d_in=32).float()
    exact = sae(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = sae(x)
        loss = sae.losses(out)["reconstruction"]
    loss.backward()
    assert out.code.values.dtype == out.x_hat.dtype == loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in sae.parameters())
    assert len(out.code.values) == len(exact.code.values)
    both = (out.code.to_dense() != 0) & (exact.code.to_dense() != 0)
    assert both.sum() > 0.98 * len(exact.code.values)
    torch.testing.assert_close(out.code.to_dense()[both], exact.code.to_dense()[both], rtol=0.02, atol=0.02)
    torch.testing.assert_close(loss, sae.losses(exact)["reconstruction"], rtol=0.01, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("cls", "k"), [(BatchTopKSAE, 4), (TopKSAE, 4)])
def test_no_rows_are_rows_too(cls, k, training):
    sae = cls(k=k, **SIZES).train(training)
    x = rows(0).float()
    out = sae(x)
    assert out.x_hat.shape == sae.reconstruct(x).shape == x.shape
    assert sae.encode(x).shape == (0, 24)
    out.x_hat.sum().backward()
    assert not sae.W_dec.grad.any()


@pytest.mark.parametrize(("cls", "k"), [(BatchTopKSAE, 4), (TopKSAE, 4)])
def test_activate_applies_the_rule_to_any_h_and_lets_gradients_through(cls, k):
    sae, x = cls(k=k, **SIZES), rows().float()
    h = sae.pre_activations(x).detach().requires_grad_()
    code = sae.activate(h)
    assert torch.equal(code.to_dense() != 0, sae.encode(x) != 0)
    code.values.sum().backward()
    assert torch.equal(h.grad, (code.to_dense() != 0).float())


def test_evaluation_under_the_threshold_is_sparse_inside_and_dense_outside():
    sae = BatchTopKSAE(k=3, **SIZES)
    x = rows().float()
    sae(x)
    sae.eval()
    code = sae(x).code
    assert isinstance(code, SparseCode)
    h = (x - sae.b_dec).flatten(1) @ sae.W_enc.flatten(1).T
    torch.testing.assert_close(sae.encode(x), h * (h > sae.threshold))
    assert torch.equal(sae.encode(x), code.to_dense())
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae.decode(code))


@pytest.mark.parametrize("dense", [False, True])
def test_split_and_truncated_are_slices_of_columns(dense):
    z = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    z = z * (z > 0.6)
    z[2] = 0
    z[:, 3:5] = 0
    rows, latents = z.nonzero(as_tuple=True)
    pattern = Pattern(torch.searchsorted(rows, torch.arange(7)), latents, 10)
    values = z[rows, latents].requires_grad_()
    code = SparseCode(pattern, values)
    if dense:
        code = code.to_dense()

    def as_dense(code):
        return code.to_dense() if isinstance(code, SparseCode) else code

    parts = [as_dense(part) for part in split_by_group(code, [3, 2, 5])]
    assert [part.shape[1] for part in parts] == [3, 2, 5]
    assert torch.equal(torch.cat(parts, dim=1), z)
    assert torch.equal(as_dense(keep_first_latents(code, 4)), z * (torch.arange(10) < 4))
    (sum((i + 1) * part.sum() for i, part in enumerate(parts))).backward()
    assert torch.equal(values.grad, torch.tensor([1.0] * 3 + [2] * 2 + [3] * 5)[latents])
