"""Compose the configs of a sweep's jobs: jobs that choose the same files of conf/ share their composition."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


class SharedComposition(ConfigLoaderImpl):
    """Hydra's config loader, but it composes the files of conf/ once per choice of files and not once per job.

    The result equals Hydra's, which also merges the files first and then applies the values (`k=8`).
    """

    def __init__(self, loader: ConfigLoader):
        super().__init__(loader.get_search_path())
        self._repositories: dict[tuple[str | None, ...], CachingConfigRepository] = {}
        self._composed: dict[tuple[str | None, ...], DictConfig] = {}
        self._validated: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the config of a job. It is composed at the first call, by which the sweeper validates the job.

        The second call, the launcher's, returns the same config. The jobs of a launcher are of one sweep.
        """
        job = tuple(sweep_overrides)
        if job in self._validated:
            return self._validated.pop(job)
        self._validated[job] = super().load_sweep_config(master_config, sweep_overrides)
        return self._validated[job]

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        hydras = [line(override) for override in parsed if override.is_hydra_override()]
        ours = [override for override in parsed if not override.is_hydra_override()]
        repository = self._repository(config_name, hydras)
        values = [override for override in ours if not chooses_file(override, repository)]
        files = [line(override) for override in ours if override not in values]
        config = copy.deepcopy(self._compose(config_name, [*hydras, *files], run_mode))
        try:
            self._apply_overrides_to_config(values, config)
        except OmegaConfBaseException as e:
            raise ConfigCompositionException().with_traceback(e.__traceback__) from e
        config.hydra.overrides.task = [line(override) for override in ours]
        config.hydra.job.override_dirname = get_overrides_dirname(ours, **config.hydra.job.config.override_dirname)
        return config

    def _repository(self, config_name: str | None, hydras: list[str]) -> CachingConfigRepository:
        """Return the files of conf/ and of the search path that these overrides of Hydra's own keys give."""
        key = (config_name, *hydras)
        if key not in self._repositories:
            self._repositories[key] = self._parse_overrides_and_create_caching_repo(config_name, hydras)[1]
        return self._repositories[key]

    def _compose(self, config_name: str | None, overrides: list[str], run_mode: RunMode) -> DictConfig:
        """Return the config of these overrides as Hydra composes it. Must not be changed."""
        key = (config_name, run_mode.name, *overrides)
        if key not in self._composed:
            self._composed[key] = super().load_configuration(config_name, overrides, run_mode)
        return self._composed[key]


def line(override: Override) -> str:
    """Return an override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def chooses_file(override: Override, repository: CachingConfigRepository) -> bool:
    """Return whether an override chooses a file of a group (`sae=topk`, `~logger`) and does not set a value."""
    return repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` refer to this config inside the block. Unlike Hydra's `set_config`, makes no copy (5 ms)."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = config  # type: ignore[assignment]
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
