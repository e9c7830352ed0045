"""JumpReLU: the kernel's gradients against their formulas (docs/pitfalls.md: P-31 to P-35)."""

import pytest
import torch
from conftest import build, planted

from sae_lab.ops.jump_relu import in_kernel_window, jump_relu, step_frequencies
from sae_lab.ops.losses import quadratic_frequency
from sae_lab.runtime.errors import UserError
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.saes.jumprelu import JumpReLUSAE
from sae_lab.training.run import initialize_from

X = planted(256, seed=1)[0]


def sae_with(penalty: str, bandwidth: float = 0.3) -> JumpReLUSAE:
    sae = build("jumprelu", f"sae.penalty={penalty}", f"sae.bandwidth={bandwidth}", "sae.normalize=none")
    with torch.no_grad():
        sae.thresholds.uniform_(0.05, 0.4, generator=torch.Generator().manual_seed(0))
    return sae


def test_golden_f_the_window_looks_at_pre_activations():
    """P-32: judged by z, 0.95 (just below theta, so z = 0) would fall out of the window."""
    h, theta = torch.tensor([[0.95], [1.04], [1.2], [0.5]]), torch.ones(1, requires_grad=True)
    assert in_kernel_window(h, theta, 0.2)[:, 0].tolist() == [True, True, False, False]
    for i, expected in enumerate([-5.0, -5.0, 0.0, 0.0]):
        (gradient,) = torch.autograd.grad(step_frequencies(h[i : i + 1], theta, 0.2).sum(), theta)
        assert gradient.item() == pytest.approx(expected)
    assert jump_relu(h, theta, 0.2)[:, 0].tolist() == pytest.approx([0, 1.04, 1.2, 0])


def test_gradients_of_the_code_are_the_kernels():
    """P-31: theta is the parameter, so no factor theta comes from a logarithm; the one here is the formula's."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    theta = torch.rand(8, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(200, 8, dtype=torch.float64, generator=generator)
    (jump_relu(h, theta, 0.3) * weight).sum().backward()
    near = ((h - theta) / 0.3).abs() < 0.5
    torch.testing.assert_close(h.grad, weight * (h > theta))
    torch.testing.assert_close(theta.grad, -(theta / 0.3) * (weight * near).sum(0))


@pytest.mark.parametrize("penalty", ["l0", "target_l0", "tanh"])
def test_value_and_gradient_of_each_penalty(penalty):
    sae = sae_with(penalty)
    out = sae(X)
    term = sae.losses(out)["sparsity"]
    h = (X[:, 0] @ sae.W_enc[:, 0].T).detach()  # both biases are zero
    theta, c = sae.thresholds.detach(), sae.COEFFICIENTS[penalty]
    z, near = h * (h > theta), ((h - theta) / 0.3).abs() < 0.5
    l0, slope = (h > theta).sum() / 256, -near.sum(0) / (0.3 * 256)
    value, gradient = {
        "l0": (l0, slope),
        "target_l0": ((l0 / 4 - 1) ** 2, 2 * (l0 / 4 - 1) / 4 * slope),
        "tanh": ((4 * z).tanh().sum(1).mean(), -(theta / 0.3) * (near * 4 * (1 - (4 * z).tanh() ** 2)).sum(0) / 256),
    }[penalty]
    torch.testing.assert_close(term, c * value)
    term.backward()
    torch.testing.assert_close(sae.thresholds.grad, c * gradient)
    if penalty == "tanh":
        assert sae.W_enc.grad.norm() > 0
    else:
        assert sae.W_enc.grad is None


def test_the_kernels_gradient_is_that_of_the_expectation():
    """d/dtheta of the mean over many rows, by a central difference over one bandwidth, for a smooth function of z."""
    h = torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([0.7], requires_grad=True)
    estimates = {
        "l0": lambda t: step_frequencies(h, t, 0.1).sum(),
        "code": lambda t: jump_relu(h, t, 0.1).mean(),
    }
    for name, mean in estimates.items():
        (gradient,) = torch.autograd.grad(mean(theta), theta)
        with torch.no_grad():
            difference = (mean(theta + 0.05) - mean(theta - 0.05)) / 0.1
        torch.testing.assert_close(gradient, difference.expand(1), rtol=0.02, atol=0, msg=name)


def test_thresholds_move_at_the_learning_rate_and_stay_non_negative():
    """P-33, P-34: theta starts small, and Adam moves it by lr a step, not by theta · lr."""
    sae = build("jumprelu", "sae.theta=0.001")
    assert sae.thresholds.dtype == torch.float32
    assert torch.equal(sae.thresholds, torch.full((64,), 0.001))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(20):
        adam.zero_grad()
        torch.stack(list(sae.losses(sae(X)).values())).sum().backward()
        adam.step()
        sae.after_step()
    assert sae.thresholds.max() > 0.1
    sae.thresholds.data.fill_(-0.5)
    sae.after_step()
    assert sae.thresholds.min() == 0


def test_target_l0_is_reached():
    """P-35: the penalty is on L0, and its dial is k."""
    sae = build("jumprelu", "sae.normalize=none")
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for i in range(300):
        adam.zero_grad()
        torch.stack(list(sae.losses(sae(planted(256, seed=i)[0])).values())).sum().backward()
        adam.step()
        sae.after_step()
    assert (sae(X).code != 0).sum(1).float().mean() == pytest.approx(4, rel=0.15)


def test_thresholds_get_a_float32_gradient_from_bfloat16_pre_activations():
    h, theta = torch.randn(64, 8).bfloat16().requires_grad_(), torch.full((8,), 0.1, requires_grad=True)
    z = jump_relu(h, theta, 0.3)
    (z.float().sum() + step_frequencies(h, theta, 0.3).sum()).backward()
    assert z.dtype == h.grad.dtype == torch.bfloat16
    assert theta.grad.dtype == torch.float32
    assert theta.grad.norm() > 0


def start(x, *overrides: str):
    sae = build("jumprelu", *overrides, n_sources=1)
    sae.resample(x)
    return sae


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_thresholds_start_where_k_latents_are_active_at_any_scale(scale):
    sae = start(scale * X, "sae.normalize=none")
    assert (sae(scale * X).code != 0).sum() == 4 * len(X) - 1  # the last one is at the threshold
    assert sae.width == sae.thresholds[0] / 2
    sae.resample(scale * X)
    assert torch.equal(sae.thresholds, start(scale * X, "sae.normalize=none").thresholds)


def test_only_the_first_training_batch_starts_thresholds(tmp_path):
    """Not a resumed run's, and not one whose weights come from another SAE."""
    sae = start(X)
    before = sae.thresholds.clone()
    sae.resample(100 * X)
    assert torch.equal(sae.thresholds, before)
    sae(X)
    resumed = load_sae_folder(save_sae(sae, tmp_path)).train()
    resumed.resample(100 * X)
    assert torch.equal(resumed.thresholds, before)
    assert resumed.width == sae.width
    other = build("jumprelu")
    other.start_from(JumpReLUSAE(d_in=16, n_latents=64, penalty="l0", theta=0.3))
    other.resample(X)
    assert torch.equal(other.thresholds, torch.full((64,), 0.3))


def test_calibration_makes_the_deployed_l0_k_and_keeps_the_ratios_of_thresholds():
    sae = sae_with("target_l0")
    before = sae.thresholds.detach().clone()
    batches = [planted(256, seed=i)[0] for i in range(10)]
    for _ in range(2):  # the second time starts over, and finds the same
        for i, x in enumerate(batches):
            sae.calibrate(x, i)
        assert (sae.eval().encode(torch.cat(batches)) != 0).sum(1).float().mean() == pytest.approx(4, rel=0.01)
    ratios = sae.thresholds.detach() / before
    torch.testing.assert_close(ratios, ratios[:1].expand(64))
    plain = sae_with("tanh")
    plain.calibrate(X, 0)
    assert torch.equal(plain.thresholds, before)


def test_given_numbers_and_other_penalties_leave_the_start_alone():
    for overrides, theta in [(["sae.theta=0.2"], 0.2), (["sae.penalty=tanh"], 0.1)]:
        sae = start(X, *overrides)
        assert torch.equal(sae.thresholds, torch.full((64,), theta))


def test_coefficients_of_runs_before_auto():
    assert build("jumprelu", "sae.sparsity_coefficient=null").coefficient == 1
    assert build("jumprelu").coefficient == 10
    assert build("jumprelu", "sae.sparsity_coefficient=0.3").coefficient == 0.3


def test_mistakes_are_named():
    with pytest.raises(UserError, match="choose target_l0, l0 or tanh"):
        JumpReLUSAE(d_in=2, n_latents=4, penalty="l1")
    with pytest.raises(UserError, match="needs a k to aim at"):
        JumpReLUSAE(d_in=2, n_latents=4)
    with pytest.raises(UserError, match="must lie between 1 and"):
        JumpReLUSAE(d_in=2, n_latents=4, k=5)
    assert JumpReLUSAE(d_in=2, n_latents=4, penalty="l0").k is None


def reference_step(h, theta, bandwidth: float):
    """1[h > theta] with the kernel's gradient for both, as a function of h - theta, by autograd in float64."""
    hard, u = (h > theta).double(), (h - theta) / bandwidth
    window = (u.abs() < 0.5).double()
    return hard + window * (u - u.detach())


@pytest.mark.parametrize("into_h", [False, True])
def test_gradients_in_h_and_theta_against_a_dense_reference(into_h):
    """The reference: h · step and step as autograd differentiates them, where h of the step is fixed unless into_h."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    theta = torch.rand(8, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    step = reference_step(h if into_h else h.detach(), theta, 0.3)
    # z = h · step(h - theta): the kernel acts where h is near theta, and the paper sets h there to theta
    at_jump = theta.detach() * (step - step.detach()) + h * step.detach()
    expected = (at_jump * weights).sum() + step.mean(0).square().sum()
    z, frequencies = jump_relu(h, theta, 0.3, into_h), step_frequencies(h, theta, 0.3, into_h)
    mine = (z * weights).sum() + frequencies.square().sum()
    torch.testing.assert_close(z, at_jump)
    pairs = zip(*(torch.autograd.grad(loss, (h, theta)) for loss in (mine, expected)), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference)


def test_frequency_penalty_grows_with_the_square_of_a_latents_frequency():
    """One latent on 40 % of the rows costs what L0 costs at the scale, and four on 10 % cost a quarter."""
    assert quadratic_frequency(torch.tensor([0.1]), 0.1) == pytest.approx(0.1)
    assert quadratic_frequency(torch.tensor([0.4]), 0.1) == pytest.approx(1.6)
    assert quadratic_frequency(torch.full((4,), 0.1), 0.1) == pytest.approx(0.4)


def test_frequency_and_preact_are_terms_of_the_loss():
    off = build("jumprelu", "sae.frequency_coefficient=0", "sae.preact_coefficient=0")
    assert not {"frequency", "preact"} & off.losses(off(X)).keys()
    sae = build("jumprelu", "sae.frequency_coefficient=0.5", "sae.frequency_scale=0.2", "sae.preact_coefficient=0.25")
    sae.batches_since_fired[:8] = 100
    with torch.no_grad():
        sae.thresholds[:8] = 50.0
    out = sae(X)
    terms, p = sae.losses(out), (out.code != 0).float().mean(0)
    torch.testing.assert_close(terms["frequency"], 0.5 * (p**2).sum() / 0.2)
    torch.testing.assert_close(terms["preact"], 0.25 * (50 - out.h[:, :8]).relu().sum(1).mean())
    gradient = torch.autograd.grad(terms["preact"], [sae.thresholds, sae.b_enc, sae.W_dec], allow_unused=True)
    torch.testing.assert_close(gradient[0], torch.where(torch.arange(64) < 8, 0.25, 0.0))
    torch.testing.assert_close(gradient[1], -gradient[0])
    assert gradient[2] is None


def test_preact_revives_dead_latents():
    sae = build("jumprelu", "sae.normalize=none", "sae.auxk_coefficient=0", "sae.preact_coefficient=0.1")
    with torch.no_grad():
        sae.b_enc[:20] = -3.0
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for i in range(200):
        adam.zero_grad()
        torch.stack(list(sae.losses(sae(planted(64, seed=i)[0])).values())).sum().backward()
        sae.before_step()
        adam.step()
        sae.after_step()
    assert not sae.dead()[:20].all()


@pytest.mark.parametrize(("source", "starts"), [("vanilla", True), ("jumprelu", False)])
def test_thresholds_start_at_the_first_batch_unless_they_are_loaded(source, starts, tmp_path):
    x = planted(64)[0]
    trained = build(source)
    trained.resample(x)
    trained(x)
    save_sae(trained, tmp_path)
    sae = build("jumprelu")
    initialize_from(sae, str(tmp_path))
    before = sae.thresholds.clone()
    sae.resample(x)
    assert torch.equal(sae.thresholds, before) != starts


def test_a_calibrated_threshold_becomes_that_of_every_latent():
    other = build("batch_topk").eval()
    other.threshold.fill_(0.7)
    converted = other.convert_to(JumpReLUSAE)
    assert torch.equal(converted.thresholds, torch.full((other.n_latents,), 0.7))
    assert torch.equal(converted.encode(X), other.encode(X))
