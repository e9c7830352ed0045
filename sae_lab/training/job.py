"""A requested run: what its config says, in a form that other processes can be given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper

from sae_lab.lm.sites import site_names
from sae_lab.runs.config import environment_file
from sae_lab.runs.paths import with_absolute_paths
from sae_lab.runtime.build import typed_keys
from sae_lab.runtime.private import keys_from_environment


class Job(NamedTuple):
    """A requested run: its config with interpolations resolved, and the files for its `.hydra/`."""

    cfg: DictConfig
    typed: dict[str, str]
    """The keys that were interpolations, by the keys that they name (see typed_keys)."""
    hydra: dict[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir)

    @property
    def sites(self) -> tuple[str, ...] | None:
        """The sites in the config."""
        return sites_of(self.cfg)


def read_job(cfg: DictConfig) -> Job:
    """Return the job of a config. Must be called while Hydra's config of this job is set."""
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(resolved, DictConfig)
    return Job(resolved, typed_keys(cfg), hydra_files(cfg))


def sites_of(cfg: DictConfig) -> tuple[str, ...] | None:
    """Return `lm.sites` of a config; None if `lm` has no such list of names."""
    sites = cfg.lm.get("sites") if isinstance(cfg.lm, DictConfig) else None
    names = [sites] if isinstance(sites, str) else sites
    return site_names(sites) if isinstance(names, Sequence) and all(isinstance(s, str) for s in names) else None


def job_logging() -> Any:
    """Return the logging config of Hydra's job, for processes that do not use Hydra; None without Hydra."""
    if not HydraConfig.initialized():
        return None
    return OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)


def hydra_files(cfg: DictConfig) -> dict[str, str]:
    """Return the files of `.hydra/` as Hydra writes them, but with interpolations and relative paths resolved.

    Where the environment has a part in a value, its key is kept, so that the value is not shown to others.
    """
    config = with_absolute_paths(OmegaConf.to_container(cfg, resolve=True))
    files = {"config.yaml": OmegaConf.to_yaml(OmegaConf.create(config))}
    if keys := keys_from_environment(cfg):
        files[environment_file(Path()).name] = "".join(f"{key}\n" for key in keys)
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        tree = {"hydra": OmegaConf.to_container(hydra, enum_to_str=True)}
        files["hydra.yaml"] = yaml.dump(tree, Dumper=get_omega_conf_dumper(), sort_keys=False, allow_unicode=True)
        files["overrides.yaml"] = OmegaConf.to_yaml(hydra.overrides.task)
    return files
