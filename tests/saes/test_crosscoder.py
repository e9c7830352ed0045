"""Crosscoders, which are linear SAEs with s > 1: norms over the sources (docs/pitfalls.md: P-47, P-48)."""

import pytest
import torch
from conftest import build

from sae_lab.ops.sparse import SparseCode, l0_per_row
from sae_lab.runtime.errors import UserError

X = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0))


def crosscoder(name: str = "batch_topk", *overrides: str, n_sources: int = 3):
    return build(name, "sae.decoder_norm=sum", "sae.normalize=none", *overrides, n_sources=n_sources)


def sums(W: torch.Tensor) -> torch.Tensor:
    """sum_s |W_i,s|"""
    return W.norm(dim=-1).sum(-1)


def unbalanced(seed: int) -> torch.Tensor:
    """Rows whose norm is shared out unequally among the sources."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 3, 16, generator=generator) * torch.rand(64, 3, 1, generator=generator) ** 3


def test_the_sum_over_sources_is_one_and_no_gradient_changes_it():
    sae = crosscoder()
    sae.W_dec.data = unbalanced(1)
    sae.after_step()
    torch.testing.assert_close(sums(sae.W_dec), torch.ones(64))
    torch.stack(list(sae.losses(sae(X)).values())).sum().backward()
    (gradient_of_norm,) = torch.autograd.grad(sums(sae.W_dec).sum(), sae.W_dec)
    assert (sae.W_dec.grad * gradient_of_norm).sum((1, 2)).abs().max() > 1e-4
    sae.before_step()
    assert sae.W_dec.grad.norm() > 0
    along = (sae.W_dec.grad * gradient_of_norm).sum((1, 2))
    torch.testing.assert_close(along, torch.zeros(64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["joint", "sum"])
def test_a_projection_keeps_how_a_row_is_shared_out(norm):
    """P-47: dividing each source's slice by its own norm would erase whose feature a latent is."""
    sae = crosscoder("topk", f"sae.decoder_norm={norm}")
    W = unbalanced(2)
    sae.W_dec.data = W.clone()
    sae.after_step()
    share = W.norm(dim=-1) / sums(W).unsqueeze(-1)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1) / sums(sae.W_dec).unsqueeze(-1), share)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_selection_is_by_the_code_times_the_decoders_norm(name):
    """P-48: as a crosscoder without a constraint does that selects by relu(h_i) · sum_s |W_dec_i,s|."""
    W_dec, W_enc = unbalanced(3), unbalanced(4)
    norm = sums(W_dec)
    h = X.flatten(1) @ W_enc.flatten(1).T
    score = h.relu() * norm
    kept = score.flatten().topk(4 * 40).indices if name == "batch_topk" else None
    mask = torch.zeros(40 * 64).index_fill(0, kept, 1).view(40, 64) if kept is not None else None
    if mask is None:
        mask = torch.zeros(40, 64).scatter(1, score.topk(4, dim=1).indices, 1)
    x_hat = torch.einsum("bf,fsd->bsd", h.relu() * mask, W_dec)
    sae = crosscoder(name)
    sae.W_dec.data, sae.W_enc.data = W_dec / norm[:, None, None], W_enc * norm[:, None, None]
    out = sae(X)
    assert isinstance(out.code, SparseCode)
    assert torch.equal(out.code.to_dense() > 0, mask * score > 0)
    torch.testing.assert_close(out.code.to_dense(), score * mask)
    torch.testing.assert_close(out.x_hat, x_hat)
    unweighted = torch.zeros(40, 64).scatter(1, h.topk(4, dim=1).indices, 1)
    assert not torch.equal(unweighted, mask)


def test_the_l1_crosscoders_loss():
    """mean (x - x_hat)² + λ mean_b sum_i z_i sum_s |W_dec_i,s|, of any dictionary without a constraint."""
    W_dec, W_enc = unbalanced(3), unbalanced(4)
    norm = sums(W_dec)
    z = (X.flatten(1) @ W_enc.flatten(1).T).relu()
    sae = crosscoder("vanilla", "sae.l1_coefficient=0.7")
    sae.W_dec.data, sae.W_enc.data = W_dec / norm[:, None, None], W_enc * norm[:, None, None]
    terms = sae.losses(sae(X))
    torch.testing.assert_close(terms["sparsity"], 0.7 * (z * norm).sum(1).mean())
    torch.testing.assert_close(terms["reconstruction"], (X - torch.einsum("bf,fsd->bsd", z, W_dec)).square().mean())


def test_both_norms_are_one_sae_with_one_source():
    x = X[:, :1]
    one, other = (build("topk", f"sae.decoder_norm={norm}") for norm in ("joint", "sum"))
    assert torch.equal(one(x).x_hat, other(x).x_hat)
    assert torch.equal(one.directions(), one.W_dec)


def test_every_source_is_encoded_and_decoded():
    """§21.4 (12): the code is one for all sources, x_hat one for each."""
    sae = crosscoder("topk").eval()
    assert (l0_per_row(sae(X).code) <= 4).all()
    silent = X.clone()
    silent[:, 1] = 0
    assert not torch.equal(sae.encode(silent), sae.encode(X))
    assert (sae.reconstruct(silent)[:, 1] != 0).any()


def test_an_unknown_norm_is_refused():
    with pytest.raises(Exception, match=r"^sae\.decoder_norm=max is not known: choose joint or sum") as caught:
        build("topk", "sae.decoder_norm=max")
    assert any(isinstance(e, UserError) for e in (caught.value, caught.value.__cause__))
