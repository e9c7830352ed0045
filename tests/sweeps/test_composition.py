"""Jobs that share a composition get the configs that Hydra composes for each."""

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf

from sae_lab.cli.help import CONF
from sae_lab.sweeps.composition import SharedComposition

JOBS = [
    ["sae=topk", "k=4", "optimizer.lr=1e-3"],
    ["sae=topk", "optimizer.lr=3e-3", "k=8", "+sae.extra={a: 1}", "lm.sites=[a,b]"],
    ["sae=route", "sae@sae.inner=matryoshka", "seed=1", "~logger", "data={prefetch: true}"],
    ["sae=topk", "experiment=quick_test", "k=4", "schedule=warmup_decay"],
    ["k=2", "hydra.job.name=mine", "experiment=matched/topk"],
]


@pytest.fixture
def loader():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().hydra


@pytest.fixture
def master(loader):
    overrides = ["sae=topk", "hydra/launcher=shared_stream", "hydra.sweep.dir=s/${now:%f}"]
    config = loader.compose_config("train", overrides, run_mode=RunMode.MULTIRUN)
    assert config.hydra.sweep.dir  # read once, so that all jobs find the same time
    return config


@pytest.mark.parametrize("job", JOBS, ids=" ".join)
def test_a_shared_composition_equals_hydras(loader, master, job):
    ours, theirs = SharedComposition(loader.config_loader), loader.config_loader
    for overrides in (["sae=topk", "k=1"], job):  # the second finds what the first has composed
        expected = theirs.load_sweep_config(master, list(overrides))
        config = ours.load_sweep_config(master, list(overrides))
        assert ours.load_sweep_config(master, list(overrides)) is config  # the launcher's is the one validated
        assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(config) == OmegaConf.is_struct(expected)
        assert config.hydra.sweep.dir == master.hydra.sweep.dir  # the same second, and its fraction


def test_jobs_that_choose_the_same_files_are_composed_once(loader, master, monkeypatch):
    composed = []
    real = ConfigLoaderImpl._compose_config_from_defaults_list
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_compose_config_from_defaults_list",
        lambda self, *a, **k: (composed.append(1), real(self, *a, **k))[1],
    )
    ours = SharedComposition(loader.config_loader)
    for k in range(4):
        for sae in ("topk", "gated"):
            assert ours.load_sweep_config(master, [f"sae={sae}", f"k={k}"]).k == k
    assert len(composed) == 2


def test_a_wrong_value_is_hydras_error(loader, master):
    with pytest.raises(ConfigCompositionException, match="Could not override 'kk'"):
        SharedComposition(loader.config_loader).load_sweep_config(master, ["kk=3"])
