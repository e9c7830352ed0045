"""The jobs of a sweep as configs, and those of them that would share a stream."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sae_lab.sweeps.composition import SharedComposition, hydra_config
from sae_lab.sweeps.shared_stream import stream_key

SHARED = "shared_stream"
SEARCHES = ("hydra/sweeper",)


def take_sweep(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of one plan of a sweep: overrides with several values as one list, `sweep=[...]`.

    Hydra's own multirun would give the jobs to a launcher, and leave a folder.
    """
    plain = [a for a in arguments if a not in ("-m", "--multirun")]
    overrides = [a for a in plain if not a.startswith("-")]
    several = [o.input_line or "" for o in OverridesParser.create().parse_overrides(overrides) if o.is_sweep_override()]
    if not several:
        return plain
    quoted = ",".join("'" + one.replace("'", "\\'") + "'" for one in several)
    return [*(a for a in plain if a not in several), f"sweep=[{quoted}]"]


def job_configs(config_name: str, overrides: Sequence[str], sweep: Sequence[str]) -> dict[str, DictConfig]:
    """Compose the config of every job of a sweep, by its overrides that differ."""
    parsed = OverridesParser.create().parse_overrides(list(sweep))
    [jobs] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    loader = SharedComposition(GlobalHydra.instance().config_loader())
    common = [o for o in overrides if not o.startswith("sweep=")]
    configs = {}
    for job in jobs:
        composed = loader.load_configuration(config_name, [*common, *job], RunMode.RUN)
        with hydra_config(composed):
            task = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            configs[" ".join(job)] = OmegaConf.create(OmegaConf.to_container(task, resolve=True))
    return configs  # type: ignore[return-value]


def by_stream(configs: dict[str, DictConfig], shared: bool) -> list[dict[str, DictConfig]]:
    """Return the jobs in groups: those that `hydra/launcher=shared_stream` would train together, else each by itself."""
    if not shared:
        return [{name: cfg} for name, cfg in configs.items()]
    groups: dict[str, dict[str, DictConfig]] = {}
    for name, cfg in configs.items():
        groups.setdefault(stream_key(cfg), {})[name] = cfg
    return list(groups.values())
