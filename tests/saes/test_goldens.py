"""Golden values and formulas, computed by hand, for the SAEs and losses that exist."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build

from sae_lab.ops import selection
from sae_lab.ops.auxk import SPARSE_FROM, auxk_loss
from sae_lab.ops.sparse import l0_per_row, smallest_active
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, TopKSAE
from sae_lab.saes.parts.normalize import NORMALIZERS, ConstantNorm, PerToken

A = torch.tensor([[3, 0.5, 0, 2], [0.2, 0.1, 0.9, 0], [0, 4, 0.3, 0.7]])


@pytest.mark.parametrize(
    ("k", "kept", "l0", "smallest"),
    [
        (1, [[3, 0, 0, 2], [0, 0, 0, 0], [0, 4, 0, 0]], [2, 0, 1], 2.0),
        (2, [[3, 0.5, 0, 2], [0, 0, 0.9, 0], [0, 4, 0, 0.7]], [3, 1, 2], 0.5),
    ],
)
def test_golden_a_batch_topk(k, kept, l0, smallest):
    code = BatchTopKSAE(k=k, d_in=2, n_latents=4).activate(A)
    torch.testing.assert_close(code.to_dense(), torch.tensor(kept).float())
    assert l0_per_row(code).tolist() == l0
    assert smallest_active(code) == pytest.approx(smallest)


def test_topk_keeps_exactly_the_k_largest_of_each_row():
    code = TopKSAE(k=2, d_in=2, n_latents=4).activate(A).to_dense()
    torch.testing.assert_close(code, torch.tensor([[3, 0, 0, 2], [0.2, 0, 0.9, 0], [0, 4, 0, 0.7]]))


def test_negative_pre_activations_never_enter_a_code():
    """P-20: fewer than k positive values leave fewer than k active latents."""
    h = torch.tensor([[-1.0, -2, 3, -4]])
    assert TopKSAE(k=2, d_in=2, n_latents=4).activate(h).to_dense().tolist() == [[0, 0, 3, 0]]
    assert BatchTopKSAE(k=2, d_in=2, n_latents=4).activate(h).to_dense().tolist() == [[0, 0, 3, 0]]


def test_batch_topk_takes_fractional_k():
    h = torch.rand(10, 16)
    assert l0_per_row(BatchTopKSAE(k=1.5, d_in=2, n_latents=16).activate(h)).sum() == 15


@pytest.mark.parametrize("k", [0, 65])
@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_k_beyond_the_dictionary_is_refused(name, k):
    with pytest.raises(Exception, match="must lie between 1 and the dictionary's 64 latents") as caught:
        build(name, f"k={k}")
    assert any(isinstance(e, UserError) for e in (caught.value, caught.value.__cause__))


def test_golden_d_per_token_normalisation():
    x = torch.randn(50, 1, 768, generator=torch.Generator().manual_seed(0)) * 7 + 3
    normalizer = PerToken(1, 768)
    y, context = normalizer(x)
    torch.testing.assert_close(y.square().mean(-1), torch.full((50, 1), 0.998691 + 7e-6), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), torch.full((50, 1), 27.6948), rtol=0, atol=1e-3)
    torch.testing.assert_close(normalizer.undo(y, context) + 1e-5 * y, x, rtol=0, atol=5e-6)


def test_golden_d_constant_norm():
    x = torch.randn(50, 1, 768, generator=torch.Generator().manual_seed(0)) * 7 + 3
    normalizer = ConstantNorm(1, 768)
    y, context = normalizer(x)
    torch.testing.assert_close(y.norm(dim=-1), torch.full((50, 1), 768**0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(normalizer.undo(y, context), x)
    assert not normalizer(torch.zeros(1, 1, 4))[0].any()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_what_undoes_a_normalisation_belongs_to_its_rows(name):
    """P-23, P-28: rows that came in between change neither the way back nor the next normalisation."""
    x, other = (torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(i)) * (7 - 6 * i) + 3 for i in range(2))
    normalizer = NORMALIZERS[name](3, 16)
    normalizer.observe(x)
    y, context = normalizer(x)
    normalizer.observe(other)
    normalizer(other)
    torch.testing.assert_close(normalizer.undo(y, context), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(normalizer(x)[0], y)


def test_threshold_estimate_is_bias_corrected_from_the_first_batch():
    """P-04, P-05: one batch gives its own minimum; a constant minimum gives that constant at every step."""
    sae = BatchTopKSAE(k=1, d_in=2, n_latents=4)
    for n in range(1, 30):
        sae.observe(A * 2)
        assert sae.threshold_updates == n
        assert sae.threshold.item() == pytest.approx(0.2, abs=1e-6)


def test_threshold_is_the_exponential_mean_divided_by_its_weight():
    minima = [1.0, 2.0, 4.0, 3.0]
    sae, mean = BatchTopKSAE(k=1, d_in=2, n_latents=2), 0.0
    for n, m in enumerate(minima, start=1):
        sae.observe(torch.tensor([[m, m + 1]]))
        mean = 0.99 * mean + 0.01 * m
        assert sae.threshold.item() == pytest.approx(mean / (1 - 0.99**n), rel=1e-5)


def test_batches_without_active_latents_do_not_count():
    sae = BatchTopKSAE(k=1, d_in=2, n_latents=4)
    for code in (torch.zeros(3, 4), A * 2, torch.zeros(3, 4), A * 2):
        sae.observe(code)
    assert sae.threshold.item() == pytest.approx(0.2, abs=1e-6)
    for i, x in enumerate([torch.zeros(3, 1, 2), torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])]):
        sae.calibrate(x, i)
    assert sae.threshold_updates == 1
    assert sae.threshold == smallest_active(sae.train().encode(x))


def test_defaults_of_signature_and_yaml_agree(sae_name):
    """An SAE built in a notebook is the SAE that the command line builds."""
    from_conf = build(sae_name)
    required = (
        "d_in",
        "n_latents",
        "k",
        "inner",
        "anneal_start",
        "anneal_end",
        "signed",
    )  # signed: abs_topk.yaml
    given = {name: value for name, value in from_conf.config.items() if name in required}
    assert type(from_conf)(**given).config == from_conf.config


def test_calibration_is_the_mean_of_the_batches_minima():
    sae = build("batch_topk").eval()
    batches = [torch.randn(32, 1, 16, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    sae.train()
    expected = torch.stack([smallest_active(sae.encode(x)) for x in batches]).mean()
    sae.eval()
    for _ in range(2):  # starting over at i = 0 forgets what was there
        for i, x in enumerate(batches):
            sae.calibrate(x, i)
        torch.testing.assert_close(sae.threshold, expected.detach())
    assert not sae.training


class TestAuxiliaryLoss:
    def sae_and_output(self):
        sae = build("topk", "sae.normalize=none")
        torch.nn.init.normal_(sae.b_dec, generator=torch.Generator().manual_seed(1))
        sae.batches_since_fired[:20] = 100
        x = torch.randn(32, 1, 16, generator=torch.Generator().manual_seed(0))
        out = sae(x)
        sae.batches_since_fired[:20] = 100
        sae.batches_since_fired[20:] = 0
        return sae, out

    def test_gradient_reaches_dead_rows_only(self):
        """Nothing to live latents, b_dec or the main reconstruction; something to dead encoders."""
        sae, out = self.sae_and_output()
        sae.auxk_loss(out).backward()
        assert sae.b_dec.grad is None or not sae.b_dec.grad.any()
        assert not sae.W_enc.grad[20:].any()
        assert not sae.W_dec.grad[20:].any()
        assert sae.W_enc.grad[:20].norm() > 0
        assert sae.W_dec.grad[:20].norm() > 0

    @pytest.mark.usefixtures("_both_ways")
    def test_value_is_the_formula(self):
        """P-10: the sum has no b_dec, which the residual lacks already."""
        sae, out = self.sae_and_output()
        sae.k_aux = 7
        e = (out.target - out.x_hat).detach()[:, 0]
        h = (out.target[:, 0] - sae.b_dec[0]) @ sae.W_enc[:20, 0].T
        code = torch.zeros(32, 20)
        for row in range(32):
            for i in h[row].relu().topk(7).indices:
                code[row, i] = h[row, i].relu()
        expected = (e - code @ sae.W_dec[:20, 0]).square().mean()
        torch.testing.assert_close(sae.auxk_loss(out), expected)

    def test_it_is_weighted_once_and_can_be_left_out(self):
        """P-16, P-17."""
        sae, out = self.sae_and_output()
        assert sae.auxk_loss(out) > 0
        torch.testing.assert_close(sae.losses(out)["auxk"], sae.auxk_loss(out) / 32)
        sae.auxk_coefficient = 0.0
        assert sae.losses(out).keys() == {"reconstruction"}

    @pytest.fixture(params=["dense", "by entry"])
    def _both_ways(self, request, monkeypatch):
        monkeypatch.setitem(SPARSE_FROM, "cpu", 1000 if request.param == "dense" else 0)

    @pytest.mark.usefixtures("_both_ways")
    @pytest.mark.parametrize("bias", [False, True])
    def test_gradient_is_autograds(self, bias, monkeypatch):
        """Over several pieces of rows, in float64, against the formula by plain autograd."""
        monkeypatch.setitem(selection.PIECE, "cpu", 0)
        generator = torch.Generator().manual_seed(0)
        x, e = (torch.randn(1100, 6, dtype=torch.float64, generator=generator) for _ in range(2))
        weights = [torch.randn(9, 6, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
        b_enc = torch.randn(9, dtype=torch.float64, generator=generator, requires_grad=True) if bias else None
        arguments = [w for w in (*weights, b_enc) if w is not None]
        loss = 3 * auxk_loss(x, e, weights[0], b_enc, weights[1], k_aux=4)
        h = F.linear(x, weights[0], b_enc)
        top = h.topk(4)
        code = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
        expected = 3 * (e - code @ weights[1]).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for mine, theirs in zip(
            torch.autograd.grad(loss, arguments), torch.autograd.grad(expected, arguments), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)

    @pytest.mark.usefixtures("_both_ways")
    def test_over_the_batch_the_strongest_dead_entries_of_all_rows_take_part(self):
        sae, out = self.sae_and_output()
        sae.auxk_selection, sae.k_aux = "batch", 7
        e = (out.target - out.x_hat).detach()[:, 0]
        h = ((out.target[:, 0] - sae.b_dec[0]) @ sae.W_enc[:20, 0].T).double()
        code = torch.zeros(32 * 20, dtype=torch.float64)
        kept = h.relu().flatten().topk(7 * 32).indices
        code[kept] = h.relu().flatten()[kept]
        expected = (e.double() - code.view(32, 20) @ sae.W_dec[:20, 0].double()).square().mean()
        assert (code.view(32, 20) != 0).sum(1).unique().numel() > 1
        torch.testing.assert_close(sae.auxk_loss(out).double(), expected, rtol=1e-5, atol=0)
        mine, dense = (torch.autograd.grad(loss, sae.W_enc)[0][:20] for loss in (sae.auxk_loss(out), expected))
        torch.testing.assert_close(mine, dense, rtol=1e-4, atol=1e-7)

    def test_an_unknown_selection_is_refused(self):
        with pytest.raises(UserError, match=r"auxk_selection=token is not known: choose row or batch"):
            TopKSAE(k=2, d_in=2, n_latents=4, auxk_selection="token")

    def test_is_zero_without_dead_latents(self):
        sae, out = self.sae_and_output()
        sae.batches_since_fired.zero_()
        assert sae.auxk_loss(out) == 0
