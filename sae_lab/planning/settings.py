"""Kinds and ranges of the settings that plan reads: those of the machine, of a model's sizes, and of a run's parts."""

from typing import Annotated, TypedDict

from annotated_types import Ge, Gt, Le
from omegaconf import DictConfig, ListConfig, OmegaConf

from sae_lab.activations.data import ActivationData
from sae_lab.cli.entry import section_from
from sae_lab.runtime.build import check_settings, checked_functions
from sae_lab.runtime.checks import check_config, show
from sae_lab.runtime.errors import SettingError, settings_under

Positive = Annotated[float, Gt(0)]
Amount = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]


class Machine(TypedDict):
    """The settings of conf/machine/ that are plain values; its yaml files say what they mean."""

    name: str
    gpu: bool
    memory: Positive
    usable: Annotated[float, Gt(0), Le(1)]
    process: Amount
    text_memory: Amount
    member_memory: Amount
    evaluation: Amount
    evaluation_token: Amount
    start_seconds: Amount
    member_seconds: Amount
    ranks_seconds: Amount
    loop_seconds: Amount
    file_write: Positive
    text: Positive
    text_with_step: bool
    cache_write: Positive
    cache_read: Positive
    link: Positive
    node_link: Positive
    node: Count
    exchange_seconds: Amount


class Peak(TypedDict):
    operations: Positive
    bytes: Positive


class ForwardPoint(TypedDict):
    parameters: Positive
    d: Count
    n_layers: Positive
    tokens_per_second: Positive


class StepPoint(TypedDict):
    d_in: Count
    n_latents: Count
    k: Positive
    batch_size: Count
    sparse: bool
    ms: Positive


class Sizes(TypedDict):
    """The settings of `lm_size`."""

    d: Count | None
    n_layers: Count | None
    parameters: Count | None
    embedding: Annotated[int, Ge(0)] | None
    vocab_size: Count | None


def check_numbers(cfg: DictConfig) -> None:
    """Check what plan computes with, before it does.

    Raises:
        SettingError: a value is not of its kind or out of its range. It names the full key.
    """
    for key, settings in (("machine", Machine), ("machine.peak", Peak), ("lm_size", Sizes)):
        with settings_under(key):
            check_config(section_from(cfg, key), settings)
    check_points(cfg, "machine.forward", ForwardPoint)
    check_points(cfg, "machine.step", StepPoint)
    for part in ("lm", "data", "sae"):
        check_settings(cfg, part)
    with settings_under("data"):  # of which a function behind `data=` passes on what it does not take
        for function in checked_functions(ActivationData):
            check_config(cfg.data, function)


def check_points(cfg: DictConfig, key: str, settings: type) -> None:
    """Check a list of measured points."""
    points = OmegaConf.select(cfg, key)
    if not isinstance(points, ListConfig) or not points or not all(isinstance(point, DictConfig) for point in points):
        raise SettingError(f"{key}={show(points)} must be a list of measured points, as in conf/machine: leave it out.")
    for i, point in enumerate(points):
        with settings_under(f"{key}[{i}]"):
            check_config(point, settings)
