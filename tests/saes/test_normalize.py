"""mean_norm, centred, whiten: what all rows of a source share, measured on the first training batch."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SAE_NAMES, build, dictionary, planted
from test_contract import same, snapshot, step

from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, PursuitSAE, RouteSAE, TopKSAE
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.saes.parts.normalize import MeanNorm, Whiten

SHARED = ("mean_norm", "centred", "whiten")
mean_normed = partial(build, "topk", "sae.normalize=mean_norm")


def shifted(n: int, n_sources: int, seed: int = 0) -> torch.Tensor:
    """Rows far from zero; each source is ten times as loud as the one before it."""
    x = torch.randn(n, n_sources, 16, generator=torch.Generator().manual_seed(seed)) + 5
    return x * 10.0 ** torch.arange(n_sources).view(1, -1, 1)


@pytest.mark.parametrize("n_sources", [1, 3])
def test_the_scale_is_the_first_batchs_mean_norm(n_sources):
    """s = sqrt(d) / mean |x|, by numpy; the batches after it change nothing."""
    sae, x = mean_normed(n_sources=n_sources), shifted(200, n_sources)
    out = sae(x)
    scale = np.sqrt((x.numpy().astype(np.float64) ** 2).sum(-1)).mean(0) / np.sqrt(16)
    np.testing.assert_allclose(sae.sources.normalizer.scale.squeeze(-1).numpy(), scale, rtol=1e-6)
    np.testing.assert_allclose(out.target.numpy(), x.numpy() / scale[:, None], rtol=1e-5)
    np.testing.assert_allclose(out.target.norm(dim=-1).mean(0), np.full(n_sources, 4), rtol=1e-6)
    known = sae.sources.normalizer.scale.clone()
    sae(7 * x)
    assert torch.equal(sae.sources.normalizer.scale, known)
    y, context = sae.sources.normalizer(3 * x)
    torch.testing.assert_close(sae.sources.normalizer.undo(y, context), 3 * x)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, scale after it, and covariance after both, of each source, by numpy in float64."""
    shift = x.mean(0)
    scale = np.sqrt(((x - shift) ** 2).sum(-1)).mean(0)[:, None] / np.sqrt(x.shape[-1])
    y = (x - shift) / scale
    return shift, scale, np.einsum("bsd,bse->sde", y, y) / len(x)


@pytest.mark.parametrize("n_sources", [1, 3])
def test_centred_rows_are_the_formula(n_sources):
    sae, x = build("topk", "sae.normalize=centred", n_sources=n_sources), shifted(200, n_sources)
    shift, scale, _ = moments(x.numpy().astype(np.float64))
    np.testing.assert_allclose(sae(x).target.numpy(), (x.numpy() - shift) / scale, rtol=1e-4, atol=1e-5)
    known = snapshot(sae.sources)
    y, context = sae(7 * x).target, sae.sources.read(7 * x)[1]
    assert same(known, snapshot(sae.sources))
    torch.testing.assert_close(sae.sources.undo(y, context), 7 * x)


@pytest.mark.parametrize("n_sources", [1, 3])
def test_whitened_rows_have_the_covariance_of_the_formula(n_sources):
    """U diag(λ / (λ + RIDGE)) Uᵀ: nearly the identity, and small where there is next to no variance."""
    x = shifted(200, n_sources) * torch.logspace(0, -2, 16)
    sae = build("topk", "sae.normalize=whiten", n_sources=n_sources)
    rows = sae(x).target.numpy().astype(np.float64)
    variances, U = np.linalg.eigh(moments(x.numpy().astype(np.float64))[2])
    assert variances.min() < Whiten.RIDGE / 10
    assert (variances / (variances + Whiten.RIDGE)).max() > 0.99
    expected = np.einsum("sde,se,sfe->sdf", U, variances / (variances + Whiten.RIDGE), U)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.einsum("bsd,bse->sde", rows, rows) / len(x), expected, atol=2e-4)
    y, context = sae.sources.read(7 * x)
    torch.testing.assert_close(sae.sources.undo(y, context), 7 * x, rtol=1e-4, atol=1e-4)


def test_whitening_needs_rows_enough():
    with pytest.raises(UserError, match=r"needs at least 32 rows, not 31: give batch_size=32 or more"):
        build("topk", "sae.normalize=whiten")(shifted(31, 1))


def test_whitened_directions_are_those_of_activations():
    """A latent's decoder row is given as what it adds to x_hat in raw units, but for the scale."""
    sae, x = build("topk", "sae.normalize=whiten"), shifted(64, 1) * torch.logspace(0, -1, 16)
    sae(x)
    sae.eval()
    one = sae.reconstruct(x, lambda z: z.zero_().index_fill(1, torch.tensor([5]), 1.0))
    added = one - sae.reconstruct(x, lambda z: z.zero_())
    expected = sae.directions()[5, 0] * sae.sources.normalizer.scale.item()
    torch.testing.assert_close(added[0, 0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", SHARED)
@pytest.mark.parametrize("name", SAE_NAMES)
def test_every_sae_trains_alike_on_rows_of_any_size(name, normalize):
    """By a power of two no bit of the weights changes; codes are the same, reconstructions as much larger."""
    x = planted(64)[0]
    saes = [build(name, f"sae.normalize={normalize}") for _ in range(2)]
    adams = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in saes]
    for _ in range(5):
        for sae, adam, size in zip(saes, adams, (1, 1024), strict=True):
            step(sae, size * x, adam)
    one, other = (sae.eval() for sae in saes)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(other.encode(1024 * x), one.encode(x))
    assert torch.equal(other.reconstruct(1024 * x), 1024 * one.reconstruct(x))


@pytest.mark.parametrize("normalize", SHARED)
@pytest.mark.parametrize("name", SAE_NAMES)
def test_only_a_training_forward_pass_measures(name, normalize):
    sae, x = build(name, f"sae.normalize={normalize}"), planted(64)[0]
    before = snapshot(sae)
    for training in (True, False):
        sae.train(training)
        for use in (sae.encode, sae.reconstruct):
            with pytest.raises(
                UserError, match=f"{normalize} has no scale before training, since the first batch sets it"
            ):
                use(x)
    with pytest.raises(UserError, match="no scale before training"):
        sae(x)
    assert same(before, snapshot(sae))
    sae.train()(x)
    measured = snapshot(sae)
    sae.encode(5 * x)
    assert same(measured, snapshot(sae))


@pytest.mark.parametrize("normalize", SHARED)
@pytest.mark.parametrize("spoil", [0.0, float("inf"), float("nan")])
def test_a_source_that_has_no_norm_is_refused(spoil, normalize):
    sae, x = build("topk", f"sae.normalize={normalize}", n_sources=2), shifted(40, 2)
    x[:, 1] *= spoil
    with pytest.raises(UserError, match="by source: leave out the source that is zero or not finite"):
        sae(x)
    sae(shifted(40, 2))
    assert (sae.sources.normalizer.scale > 0).all()


@pytest.mark.parametrize("normalize", SHARED)
def test_what_is_measured_travels_with_the_weights(normalize, tmp_path):
    """P-25: into files, copies, other classes and searches; who takes over the weights measures nothing anew."""
    sae, started = (build("topk", f"sae.normalize={normalize}") for _ in range(2))
    x = shifted(64, 1)
    sae(x)
    measured, x_hat = snapshot(sae.sources), sae.eval().reconstruct(x)
    started.start_from(sae)
    started(100 * x)
    heirs = [load_sae_folder(save_sae(sae, tmp_path)), copy.deepcopy(sae), started, sae.convert_to(BatchTopKSAE)]
    heirs.append(PursuitSAE.of(sae, "gradient_pursuit"))
    assert all(same(snapshot(heir.sources), measured) for heir in heirs)
    assert torch.equal(heirs[0].reconstruct(x), x_hat)
    assert torch.equal(heirs[1].reconstruct(x), x_hat)


@pytest.mark.parametrize("prefix", ["", "inner.", "sae."])
def test_the_names_of_earlier_versions_are_renamed_on_load(prefix):
    """Alone, inside a RouteSAE, and inside a LightningModule, whose checkpoint has the prefix `sae.`."""
    sae = build("topk", "sae.n_inputs=1", "sae.normalize=mean_norm", n_sources=2)
    sae(shifted(64, 2))
    old = {f"{prefix}{name.removeprefix('sources.')}": t for name, t in sae.state_dict().items()}
    assert {f"{prefix}normalizer.scale", f"{prefix}target_normalizer.scale"} <= old.keys()
    fresh = build("topk", "sae.n_inputs=1", "sae.normalize=mean_norm", n_sources=2)
    holder = torch.nn.ModuleDict({prefix.rstrip("."): fresh}) if prefix else fresh
    holder.load_state_dict(old)
    assert same(snapshot(fresh), snapshot(sae))


def test_a_start_before_training_measures_its_own_rows():
    sae = mean_normed()
    sae.start_from(mean_normed())
    sae(shifted(64, 1))
    assert sae.sources.normalizer.scale.item() == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("name", SAE_NAMES)
def test_parameters_in_other_units_are_refused(name):
    sae, other = (build(name, f"sae.normalize={normalize}") for normalize in ("mean_norm", "none"))
    with pytest.raises(UserError, match=r"with normalize=none need sae\.normalize=none here as well"):
        sae.start_from(other)


def test_a_routed_row_is_undone_by_its_sites_scale():
    inner = partial(TopKSAE, k=64, normalize="none")
    sae, x = RouteSAE(inner=inner, d_in=16, n_latents=64, n_sources=2, normalize="mean_norm"), shifted(64, 2)
    sae(x)
    sae.eval()
    at = sae.predicted_mask(x)
    row_hat = sae.inner.decode(sae.encode(x))[:, 0]
    r = sae.route(x)[1].sum(dim=1)
    expected = row_hat / r.unsqueeze(-1) * sae.sources.normalizer.scale[at.int().argmax(dim=1)]
    torch.testing.assert_close(sae.reconstruct(x)[at], expected)


def test_an_unknown_word_is_told_the_known_ones():
    with pytest.raises(UserError, match="choose none, per_token, constant_norm, mean_norm, centred or whiten"):
        TopKSAE(k=2, d_in=4, n_latents=8, normalize="rms")


def test_float64_rows_have_a_float64_scale():
    normalizer, x = MeanNorm(1, 16).double(), shifted(50, 1).double()
    normalizer.observe(x)
    assert normalizer.scale.dtype == torch.float64
    assert normalizer.divisor().item() == pytest.approx(x.norm(dim=-1).mean().item() / 4, rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [("topk",), ("batch_topk",), ("jumprelu",), ("vanilla", "sae.l1_coefficient=0.03")],
    ids=lambda s: s[0],
)
def test_a_planted_dictionary_is_recovered_from_large_rows(settings):
    sae = build(*settings, "k=3", "sae.normalize=mean_norm", n_latents=48)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for i in range(1500):
        step(sae, 1000 * planted(256, seed=i)[0], adam)
    cosines = planted(1)[1].flatten(1) @ dictionary(sae).W_dec.detach().flatten(1).T
    assert cosines.max(dim=1).values.mean() >= 0.95
    x = 1000 * planted(2000, seed=9999)[0]
    fvu = (x - sae.eval().reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.07
