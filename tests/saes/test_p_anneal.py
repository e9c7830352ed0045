"""p-annealing: penalty and gradients against a dense reference, its schedule, its size, exact resume, its export."""

import copy
import json

import pytest
import torch
from conftest import build, compose, equal, planted

from sae_lab.interop import dictionary_learning, sae_lens
from sae_lab.ops.losses import lp
from sae_lab.runtime.errors import UserError
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.training.run import initialize_from

GATED = "sae._target_=sae_lab.saes.p_anneal.PAnnealGatedSAE"
SHORT = ("sae.anneal_start=4", "sae.anneal_end=12", "sae.p_end=0.2", "sae.normalize=none")
X = planted(64, seed=1)[0]
VARIANTS = pytest.mark.parametrize("variant", [(), (GATED, "~sae.unit_norm")], ids=["relu", "gated"])


def annealed(*overrides: str):
    return build("p_anneal", *SHORT, *overrides)


def step(sae, adam, x) -> dict[str, float]:
    adam.zero_grad()
    terms = sae.losses(sae(x))
    torch.stack(list(terms.values())).sum().backward()
    sae.before_step()
    adam.step()
    sae.after_step()
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("p", [1.0, 0.5, 0.2])
def test_value_and_gradient_are_those_of_a_dense_reference(p):
    z = (torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).relu() + 1e-3).mul_(torch.arange(8) > 2)
    z.requires_grad_()
    w = z.detach().double().requires_grad_()
    active = w[:, 3:]
    expected = (p * active.log()).exp().sum() / 20
    expected.backward()
    value = lp(z, p)
    value.backward()
    torch.testing.assert_close(value.double(), expected)
    torch.testing.assert_close(z.grad.double(), w.grad, rtol=1e-5, atol=1e-6)
    assert (z.grad[:, :3] == 0).all()


@VARIANTS
def test_p_falls_linearly_and_the_penalty_keeps_its_size(variant):
    sae = annealed(*variant)
    scale, p_before = 1.0, 1.0
    for t in range(1, 16):
        out = sae(planted(64, seed=t)[0])
        z = sae.penalized(out).detach().double()
        p = 1 - 0.8 * min(max((t - 4) / 8, 0), 1)
        before, now = ((q * z[z > 0].log()).exp().sum() / 64 for q in (p_before, p))
        scale, p_before = scale * (before / now).item(), p
        assert sae.p(sae.steps).item() == pytest.approx(p)
        assert sae.scale.item() == pytest.approx(scale, rel=1e-5)
        assert sae.losses(out)["sparsity"].item() == pytest.approx(sae.l1_coefficient * scale * now.item(), rel=1e-5)


@VARIANTS
def test_before_annealing_it_is_the_plain_sae_to_the_bit(variant):
    sae, plain = annealed(*variant), build("gated" if variant else "vanilla", "sae.normalize=none")
    plain.l1_coefficient = sae.l1_coefficient
    for _ in range(4):
        mine, theirs = sae.losses(sae(X)), plain.losses(plain(X))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert sae.scale == 1
    sae(X)
    assert sae.scale != 1


def test_a_batch_without_active_latents_leaves_the_scale():
    sae = annealed()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    for _ in range(8):
        terms = sae.losses(sae(X))
    assert sae.scale == 1
    assert terms["sparsity"] == 0


@VARIANTS
def test_a_saved_sae_continues_to_the_bit(variant, tmp_path):
    """Only evaluation lies between: it changes neither p nor the scale."""
    sae = annealed(*variant)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for i in range(8):
        step(sae, adam, planted(64, seed=i)[0])
    sae.eval()(X)
    other = load_sae_folder(save_sae(sae, tmp_path)).train()
    again = torch.optim.Adam(other.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(adam.state_dict()))
    sae.train()
    for i in range(8, 14):
        x = planted(64, seed=i)[0]
        assert step(sae, adam, x) == step(other, again, x)
    assert equal(sae.state_dict(), other.state_dict())
    assert sae.scale != 1


def test_it_is_exported_as_the_sae_that_it_is_deployed_as(tmp_path):
    for variant, architecture, theirs in [((), "standard", "AutoEncoder"), ((GATED, "~sae.unit_norm"), "gated", None)]:
        sae = annealed(*variant)
        for i in range(8):
            sae(planted(64, seed=i)[0])
        sae.eval()
        sae_lens.write(sae, tmp_path / architecture, {})
        back = sae_lens.read(tmp_path / architecture)
        torch.testing.assert_close(back.encode(X), sae.encode(X))
        assert json.loads((tmp_path / architecture / "cfg.json").read_text())["architecture"] == architecture
        if theirs:
            dictionary_learning.write(sae, tmp_path / theirs, {})
            config = json.loads((tmp_path / theirs / "config.json").read_text())
            assert config["trainer"]["dict_class"] == theirs


def test_the_gated_variant_recovers_the_planted_dictionary():
    sae = build("p_anneal", GATED, "~sae.unit_norm", "sae.l1_coefficient=0.01", "sae.normalize=none", n_latents=48)
    sae.anneal_start, sae.anneal_end = 300, 1500
    adam = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for i in range(1500):
        step(sae, adam, 0.1 * planted(256, seed=i)[0])
    cosines = planted(1)[1].flatten(1) @ sae.W_dec.detach().flatten(1).T
    assert cosines.max(dim=1).values.mean() >= 0.95


def test_annealing_covers_the_run_of_each_command():
    run = compose("sae=p_anneal", "n_tokens=10_001", "batch_size=100").sae
    assert (run.anneal_start, run.anneal_end) == (20, 101)
    study = compose("sae=p_anneal", "n_steps=500", config_name="planted").sae
    assert (study.anneal_start, study.anneal_end) == (100, 500)
    assert compose("sae=p_anneal", config_name="benchmark").sae.anneal_end == 1000


def test_an_end_before_the_start_is_refused():
    with pytest.raises(UserError, match=r"anneal_end=4 must be above sae\.anneal_start=4"):
        build("p_anneal", "sae.anneal_start=4", "sae.anneal_end=4")


def test_training_from_other_weights_anneals_from_the_beginning(tmp_path):
    trained = annealed().train()
    adam = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for _ in range(14):
        step(trained, adam, X)
    assert (trained.p(trained.steps), trained.scale != 1) == (pytest.approx(0.2), True)
    save_sae(trained, tmp_path)
    sae = annealed()
    initialize_from(sae, str(tmp_path))
    assert (int(sae.steps), float(sae.p(sae.steps + 1)), float(sae.scale)) == (0, 1, 1)
    assert torch.equal(sae.W_enc, trained.W_enc)
