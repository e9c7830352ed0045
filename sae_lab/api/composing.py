"""conf/ composed from Python, as the command line composes it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig

import sae_lab.cli.entry  # noqa: F401  registers the resolvers of conf/
from sae_lab.activations.building import build_data
from sae_lab.activations.stream import StreamData
from sae_lab.cli.folder_names import new_folder
from sae_lab.cli.help import CONF
from sae_lab.runtime.checks import check_value
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.saes.base import BaseSAE
from sae_lab.training.run import build_sae, train_run

UNNAMED = "(a new folder)"
"""`run_dir` until a run begins that was given none."""


def compose_config(*overrides: str) -> DictConfig:
    """Return the config of `train` with overrides, as typed after `python -m sae_lab.train`.

    Raises:
        UserError: an override names no option or choice.
    """
    check_value("overrides", overrides, Sequence[str])
    typed = [override.replace("hydra.run.dir=", "run_dir=", 1) for override in overrides]
    given = any(override.startswith("run_dir=") for override in typed)
    try:
        with own_hydra(), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("train", overrides=[*typed, *([] if given else [f"run_dir='{UNNAMED}'"])])
    except HydraException as e:
        raise UserError(f"{', '.join(overrides)} cannot be composed: {first_line(e)}") from e


@contextmanager
def own_hydra() -> Iterator[None]:
    """Let Hydra compose inside the block, whatever else this process uses it for."""
    before = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(before)


def name_folder(cfg: DictConfig) -> None:
    """Create a folder by date and time for a run that was given none, as the command does."""
    if cfg.run_dir == UNNAMED:
        cfg.run_dir = new_folder(str(Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")))


class Composed:
    """The objects of a config, each built when it is first asked for.

    Attributes:
        cfg: the config.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    @cached_property
    def data(self) -> StreamData:
        """The data; `data.lm` is the language model."""
        return build_data(self.cfg)

    @cached_property
    def sae(self) -> BaseSAE:
        """The SAE, untrained, for the width and the sites of the data."""
        return build_sae(self.cfg, self.data)

    def train(self) -> dict[str, Any]:
        """Train the run, as the command does. Returns its metrics; `cfg.run_dir` is its folder."""
        name_folder(self.cfg)
        return train_run(self.cfg)


def compose(*overrides: str) -> Composed:
    """Compose conf/ with overrides, and return its objects.

        run = compose("sae=topk", "k=8", "lm.sites=[transformer.h.3]")
        run.data.lm, run.sae, run.cfg.n_tokens

    Raises:
        UserError: an override names no option or choice.
    """
    return Composed(compose_config(*overrides))
