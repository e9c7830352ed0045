"""The jobs of a sweep as configs, and those of them that would share a stream."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sae_lab.sweeps.composition import SharedComposition
from sae_lab.sweeps.shared_stream import stream_key

SHARED = "shared_stream"


def job_configs(config_name: str, overrides: Sequence[str], sweep: Sequence[str]) -> dict[str, DictConfig]:
    """Compose the config of every job of a sweep, by its overrides that differ."""
    parsed = OverridesParser.create().parse_overrides(list(sweep))
    [jobs] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    loader = SharedComposition(GlobalHydra.instance().config_loader())
    common = [o for o in overrides if not o.startswith("sweep=")]
    configs = {}
    for job in jobs:
        composed = loader.load_configuration(config_name, [*common, *job], RunMode.RUN)
        configs[" ".join(job)] = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return configs


def by_stream(configs: dict[str, DictConfig], shared: bool) -> list[dict[str, DictConfig]]:
    """Return the jobs in groups: those that `hydra/launcher=shared_stream` would train together, or each by itself."""
    if not shared:
        return [{name: cfg} for name, cfg in configs.items()]
    groups: dict[str, dict[str, DictConfig]] = {}
    for name, cfg in configs.items():
        resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        assert isinstance(resolved, DictConfig)
        groups.setdefault(stream_key(resolved), {})[name] = cfg
    return list(groups.values())
