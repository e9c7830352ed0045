"""Every preset composes and builds its SAE."""

import pytest
from conftest import compose
from hydra.utils import instantiate

from sae_lab.cli.help import CONF

PRESETS = sorted(
    p.relative_to(CONF / "experiment").with_suffix("").as_posix() for p in CONF.glob("experiment/**/*.yaml")
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_its_sae(name):
    cfg = compose(f"experiment={name}")
    n_latents, n_sources = cfg.n_latents or cfg.expansion * 128, len(cfg.lm.sites) if "sites" in cfg.lm else 2
    assert instantiate(cfg.sae, d_in=16, n_latents=n_latents, n_sources=n_sources).n_latents == n_latents


def test_the_topk_librarys_settings():
    cfg = compose("experiment=gemma2_topk")
    assert (cfg.lm.name, cfg.lm.sites, cfg.k, cfg.n_latents) == ("google/gemma-2-2b", ["model.layers.15"], 128, 9216)
    assert (cfg.sae.tied, cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.batch_size) == (True, 1e-3, 1e-4, 256)
