"""The contract of saes/base.py, for every conf/sae/*.yaml and for one and three sources."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SAE_NAMES, build, dictionary, planted

from sae_lab.ops.sparse import fired_latents, l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.saes.topk import TopKSAE


@pytest.fixture(params=[1, 3], ids=["1source", "3sources"])
def n_sources(request) -> int:
    return request.param


@pytest.fixture
def sae(sae_name, n_sources) -> BaseSAE:
    return build(sae_name, n_sources=n_sources)


@pytest.fixture
def x(n_sources) -> torch.Tensor:
    return planted(64, n_sources=n_sources)[0] + 0.1


def snapshot(sae: BaseSAE) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in sae.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step(sae: BaseSAE, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One training step as the module does it."""
    loss = torch.stack(list(sae.losses(sae(x)).values())).sum()
    optimizer.zero_grad()
    loss.backward()
    sae.before_step()
    optimizer.step()
    sae.after_step()
    return loss.item()


def test_forward_has_the_shapes_of_the_contract(sae, x, n_sources):
    out = sae(x)
    assert out.x_hat.shape == out.target.shape == (64, dictionary(sae).n_sources, 16)
    assert l0_per_row(out.code).shape == (64,)
    assert sae.reconstruct(x).shape == x.shape
    assert sae.decode(sae.encode(x)).shape == x.shape


def test_an_edit_of_the_code_reaches_x_hat_in_raw_units(sae, x):
    """No edit changes nothing; a latent set to nought takes away what it adds, in units of x."""
    sae.eval()
    whole, code = sae.autoencode(x)
    torch.testing.assert_close(sae.reconstruct(x, lambda z: z), whole)
    z = sae.encode(x)
    strongest = int(z.sum(dim=0).argmax())
    without, edited = sae.autoencode(x, lambda z: z.index_fill(1, torch.tensor([strongest]), 0.0))
    assert l0_per_row(edited).sum() == l0_per_row(code).sum() - (z[:, strongest] != 0).sum()
    lost = (whole - without).flatten(1).norm(dim=1)
    assert torch.equal(lost > 1e-6, z[:, strongest].abs() > 1e-6)
    if sae.config["normalize"] == "none":
        expected = z[:, [strongest]].unsqueeze(-1) * sae.directions()[strongest]
        torch.testing.assert_close((whole - without)[:, :1], expected[:, :1], atol=1e-5, rtol=1e-4)


def test_losses_are_named_finite_scalars_that_reach_the_weights(sae, x):
    losses = sae.losses(sae(x))
    assert "reconstruction" in losses
    assert all(term.ndim == 0 and term.isfinite() for term in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(W.grad.norm() > 0 for W in sae.parameters() if W.ndim == 3)
    assert dictionary(sae).W_dec.grad.norm() > 0


def test_eval_codes_do_not_depend_on_the_rest_of_the_batch(sae, x):
    for _ in range(3):
        sae(x)
    sae.eval()
    whole, part = sae.encode(x), sae.encode(x[:5])
    assert fired_latents(whole).any()
    torch.testing.assert_close(whole[:5], part, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:5] != 0, part != 0)


def test_evaluation_changes_no_state_under_either_rule(sae, x):
    sae(x)
    before = snapshot(sae)
    for training in (False, True):
        sae.train(training)
        sae.encode(x)
        sae.reconstruct(x)
    sae.eval()
    sae(x)
    assert same(before, snapshot(sae))


def test_training_forward_changes_only_buffers(sae, x):
    before = snapshot(sae)
    sae(x)
    parameters = {name for name, _ in sae.named_parameters()}
    after = snapshot(sae)
    assert all(torch.equal(before[name], after[name]) for name in parameters)


def test_folder_round_trip_is_exact(sae, x, tmp_path):
    sae(x)
    loaded = load_sae_folder(save_sae(sae, tmp_path / "sae"))
    assert type(loaded) is type(sae)
    assert loaded.config == sae.config
    assert not loaded.training
    assert same(snapshot(sae), snapshot(loaded))
    assert torch.equal(loaded.reconstruct(x), sae.eval().reconstruct(x))


def test_weights_come_from_the_seed_alone(sae, sae_name, n_sources):
    torch.manual_seed(99)
    assert same(snapshot(sae), snapshot(build(sae_name, n_sources=n_sources)))
    other = build(sae_name, "seed=1", n_sources=n_sources)
    assert not torch.equal(dictionary(sae).W_dec, dictionary(other).W_dec)


def test_decoder_rows_keep_unit_norm_and_their_gradient_is_orthogonal(sae, x):
    adam, W_dec = torch.optim.Adam(sae.parameters(), lr=1e-2), dictionary(sae).W_dec
    for _ in range(3):
        step(sae, x, adam)
    torch.testing.assert_close(W_dec.flatten(1).norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
    torch.stack(list(sae.losses(sae(x)).values())).sum().backward()
    sae.before_step()
    along = (W_dec.grad * W_dec).flatten(1).sum(1)
    assert W_dec.grad.norm() > 0
    torch.testing.assert_close(along, torch.zeros(64), rtol=0, atol=1e-7)


def test_training_lowers_the_loss(sae, x):
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses = [step(sae, x, adam) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_latent_dies_exactly_after_dead_after_batches(sae, x):
    weights = dictionary(sae)
    weights.dead_after = 3
    silent = torch.arange(8)
    with torch.no_grad():
        getattr(weights, "W_enc", weights.W_dec)[silent] = 0.0  # a search has only the decoder to choose by
        if getattr(weights, "b_enc", None) is not None:
            weights.b_enc[silent] = -1.0
    for n in range(1, 5):
        sae(x)
        assert sae.dead()[silent].all() == (n >= 3)


def test_the_dead_stay_dead_through_files_and_devices(sae, tmp_path):
    """P-12: what an SAE remembers is a buffer; a tensor that is none would not move, nor be saved."""
    dictionary(sae).batches_since_fired[:8] = 100
    assert load_sae_folder(save_sae(sae, tmp_path)).dead().nonzero().flatten().tolist() == list(range(8))
    assert [v for module in sae.modules() for v in vars(module).values() if isinstance(v, torch.Tensor)] == []
    assert sae.to("meta").dead().is_meta


def test_a_latent_starts_out_writing_what_it_reads(sae):
    """P-56: each row of W_dec begins as the row of W_enc, at unit norm."""
    if not hasattr(dictionary(sae), "W_enc"):
        pytest.skip("it has no encoder")
    W_enc, W_dec = dictionary(sae).W_enc.flatten(1), dictionary(sae).W_dec.flatten(1)
    torch.testing.assert_close(W_dec, F.normalize(W_enc, dim=1))


@pytest.mark.parametrize("more", [(0, -1), (1, 0), (2, 0)], ids=str)
def test_activations_of_another_shape_are_refused(sae, more):
    """P-07: an axis too many is never taken for sources."""
    if sae.n_sources == 1 and more[0]:
        return  # positions of texts: each is a row of its own
    with pytest.raises(UserError, match="activations must have the shape"):
        sae.encode(torch.zeros(4, sae.n_sources + more[0], 16 + more[1]))


def test_axes_before_a_row_are_kept(sae, x):
    """(n, t, s, d), and (n, t, d) of one source, are n·t rows."""
    sae(x)
    sae.eval()
    texts = x.view(4, 16, *x.shape[1:])
    several = [texts] if sae.n_sources > 1 else [texts, texts[:, :, 0]]
    for given in several:
        code, x_hat = sae.encode(given), sae.reconstruct(given)
        assert torch.equal(code.flatten(0, 1), sae.encode(x))
        assert x_hat.shape == given.shape
        assert torch.equal(x_hat.reshape(x.shape), sae.reconstruct(x))
        assert sae.decode(code).shape == texts.shape
        torch.testing.assert_close(sae.decode(code, given), x_hat)
        assert sae(given).x_hat.shape[0] == 64


def test_decode_gives_raw_units_where_all_rows_have_the_same(sae, x):
    sae(x)
    sae.eval()
    code, x_hat = sae.encode(x), sae.reconstruct(x)
    torch.testing.assert_close(sae.decode(code, x), x_hat)
    if sae.config["normalize"] in ("none", "mean_norm", "centred") and sae.predicted_mask(x) is None:
        torch.testing.assert_close(sae.decode(code), x_hat)


def test_an_output_tells_its_losses_and_l0(sae, x):
    out = sae(x)
    terms = sae.losses(out)
    assert out.losses.keys() == terms.keys()
    assert out.loss == out["loss"] == torch.stack(list(terms.values())).sum()
    assert out["reconstruction"] == terms["reconstruction"]
    assert out.l0 == out["l0"] == l0_per_row(out.code).float().mean()
    with pytest.raises(KeyError, match="expected one of loss, "):
        out["los"]
    with pytest.raises(UserError, match="does not know its SAE"):
        torch.nn.Module.__call__(sae, x).losses  # noqa: B018


def test_a_repr_shows_sizes_and_mode_and_its_config_builds_the_sae_again(sae):
    shown = repr(sae.eval())
    assert shown.startswith(f"{type(sae).__name__}(")
    assert shown.endswith("; eval, cpu)")
    assert "d_in=16, n_latents=64" in shown
    assert "\n" not in shown
    again = type(sae).from_config(sae.config)
    assert same(snapshot(sae), snapshot(again))


def test_rows_without_a_source_axis_mean_the_same(sae_name):
    sae, x = build(sae_name), planted(20)[0]
    sae(x)
    sae.eval()
    assert torch.equal(sae.encode(x[:, 0]), sae.encode(x))
    assert torch.equal(sae.reconstruct(x[:, 0]), sae.reconstruct(x)[:, 0])


def test_planted_dictionary_is_recovered(sae_name):
    """Each planted direction has a latent whose decoder row points its way: mean max cosine >= 0.95."""
    signed = build(sae_name).signed
    d, active = (24, 2) if signed else (16, 3)  # signed sums are harder to take apart: a batch rule reaches 0.89 there
    groups = ["sae.group_sizes=[24,24]"] if sae_name == "temporal" else []  # the first has all features
    sae = build(sae_name, f"k={active}", "sae.normalize=none", *groups, d_in=d, n_latents=48)
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for i in range(1500):
        x = planted(256, d, active=active, seed=i, signed=signed)[0]
        step(sae, 0.1 * x, adam)  # small rows: an L1 penalty then weighs as on unit-std input
        if i % 250 == 249 and found(sae, d) >= 0.95:
            break
    assert found(sae, d) >= 0.95


def found(sae, d: int) -> float:
    """Mean, over the planted directions, of the largest cosine with a decoder row."""
    cosines = planted(1, d)[1].flatten(1) @ dictionary(sae).W_dec.detach().flatten(1).T
    return (cosines.abs() if sae.signed else cosines).max(dim=1).values.mean().item()


TENSORS_OF_LATENTS = [*((name,) for name in SAE_NAMES), ("topk", "sae.hidden=[8]"), ("topk", "sae.encoder_bias=true")]


@pytest.mark.parametrize("settings", TENSORS_OF_LATENTS, ids=" ".join)
def test_the_tensors_with_an_axis_of_latents_are_those_that_change_with_their_number(settings):
    few, many = (build(*settings, n_latents=n) for n in (64, 96))
    shapes = zip(few.state_dict().items(), many.state_dict().values(), strict=True)
    grown = {name: [i for i, n in enumerate(a.shape) if n != b.shape[i]] for (name, a), b in shapes}
    assert {name: axes for name, axes in grown.items() if axes} == {
        name: [axis] for name, axis in few.latent_axes().items()
    }
    assert few.own_latents == range(64)


def test_an_array_is_told_how_to_become_a_tensor():
    sae = TopKSAE(k=2, d_in=4, n_latents=8)
    for call in (sae.encode, sae.reconstruct, sae, sae.autoencode):
        with pytest.raises(
            UserError, match=r"^activations must be a tensor, not a ndarray: give torch\.as_tensor\(x\)"
        ):
            call(np.zeros((3, 4), np.float32))
    with pytest.raises(UserError, match=r"^the code must be a tensor, not a ndarray"):
        sae.decode(np.zeros((3, 8), np.float32))
