"""The learning rate of optimizer.lr=auto: its formula, its bounds, the run that uses it."""

import pytest
from conftest import compose
from omegaconf import OmegaConf

from sae_lab.runtime.errors import SettingError
from sae_lab.training.rate import automatic_rate, resolve_rate


def test_the_rate_is_the_formula_between_its_bounds():
    assert automatic_rate(d=64, n_latents=1024, n_steps=977) == pytest.approx(10 / (64 * 32 * 977) ** 0.5)
    assert automatic_rate(d=128, n_latents=1024, n_steps=1954) == pytest.approx(3.536e-3, rel=1e-3)  # the demo
    assert automatic_rate(d=768, n_latents=2**14, n_steps=10**6) == 2e-4
    assert automatic_rate(d=768, n_latents=2**16, n_steps=10**6) == 1e-4
    assert automatic_rate(d=64, n_latents=1024, n_steps=60) == 1e-2


def test_a_longer_run_a_wider_one_and_one_of_more_latents_never_get_a_higher_rate():
    of = automatic_rate
    for d, f, steps in [(64, 512, 50), (128, 1024, 1000), (768, 24_576, 20_000), (4096, 131_072, 10**6)]:
        assert max(of(2 * d, f, steps), of(d, 2 * f, steps), of(d, f, 2 * steps)) <= of(d, f, steps)


def test_only_a_rate_that_is_auto_is_replaced():
    cfg = compose().optimizer
    assert resolve_rate(cfg, 128, 1024, 1954) == {"lr": automatic_rate(128, 1024, 1954)}
    assert resolve_rate(OmegaConf.merge(cfg, {"lr": 1e-3}), 128, 1024, 1954) == {}


def test_auto_is_refused_for_another_optimizer():
    cfg = OmegaConf.create({"_target_": "torch.optim.SGD", "lr": "auto"})
    with pytest.raises(SettingError, match=r"optimizer\.lr=auto is a rate for Adam, not for SGD: give optimizer\.lr a"):
        resolve_rate(cfg, 128, 1024, 1954)
