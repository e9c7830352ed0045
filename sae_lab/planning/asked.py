"""What the settings of a run ask of its layout, and what plan does not know."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from sae_lab.parallel.shards import check_shards
from sae_lab.planning.layouts import Asked
from sae_lab.planning.settings import check_numbers
from sae_lab.planning.sizes import SAESize, models_of
from sae_lab.runtime.checks import show
from sae_lab.runtime.errors import SettingError

CACHED, TENSOR = "sae_lab.cache.data.CachedData", "sae_lab.activations.tensor.TensorData"
NO_LM = "sae_lab.lm.none.NoLM"


def with_least_devices(cfg: DictConfig) -> DictConfig:
    """Return the config with as many processes as its shards need, where `trainer.devices=1` leaves the number open."""
    m = cfg.trainer.get("shard_latents", 1)
    if cfg.trainer.devices != 1 or not isinstance(m, int) or m <= 1:
        return cfg
    cfg = cfg.copy()
    cfg.trainer.devices = m
    return cfg


def check_planned(cfg: DictConfig) -> None:
    """Raise a SettingError for runs whose work is not known, and for settings with which plan cannot compute."""
    check_numbers(cfg)
    if cfg.data.get("_target_") == TENSOR:
        raise SettingError("plan needs the language model that activations come from: data=tensor has none.")
    if cfg.lm.get("_target_") == NO_LM:
        raise SettingError("plan needs a language model, and lm=none is none: choose another lm=..., such as lm=tiny.")
    if cfg.loss:
        raise SettingError(
            f"loss={cfg.loss} runs the language model in every step, which plan does not know: leave it out."
        )
    for key, model in models_of(cfg).items():
        for name in ("name", "sites"):
            if OmegaConf.is_missing(model, name) or not model.get(name):
                raise SettingError(f"{key}.{name} has no value: give {key}.{name}=...")
        if model.get("device_map") is not None:
            raise SettingError(
                f"{key}.device_map={show(model.device_map)} splits the language model over devices, which plan does "
                "not know: leave it out."
            )
    check_lm_place(cfg)


def check_lm_place(cfg: DictConfig) -> None:
    """Raise a SettingError for a place of the language model whose rates are not known, or where the SAE trains."""
    kind, device = "cuda" if cfg.machine.gpu else "cpu", cfg.lm.get("device", "auto")
    if device not in ("auto", kind, f"{kind}:0"):
        other = "" if not str(device).startswith(kind) else f" give lm.devices=[{str(device).partition(':')[2]}], or"
        raise SettingError(
            f"plan knows the language model on the device that trains, not lm.device={show(device)}:{other} leave it "
            "out."
        )
    if is_cached(cfg):
        return
    names = lm_devices(cfg)
    wrong = [name for name in names if (not name.isdecimal() if cfg.machine.gpu else name != "cpu")]
    if wrong:
        raise SettingError(
            f"lm.devices has {wrong[0]}, which is no {kind} device of {cfg.machine.name}: give others, or leave it out."
        )
    if both := [name for name in names if cfg.machine.gpu and int(name) < cfg.trainer.devices]:
        raise SettingError(
            f"lm.devices has {both[0]}, which trains as well (trainer.devices={cfg.trainer.devices}): plan knows only "
            "devices of the language model alone."
        )


def lm_devices(cfg: DictConfig) -> list[str]:
    """Return the devices of `lm.devices`, GPUs by their number and once."""
    names = [str(name).removeprefix("cuda:") for name in cfg.lm.get("devices") or ()]
    return list(dict.fromkeys(names)) if cfg.machine.gpu else names


def asked_for(cfg: DictConfig, saes: Sequence[SAESize]) -> Asked:
    """Return what the settings of runs on one stream ask of their layout: runs that share a stream have one process.

    `trainer.devices=1` and `trainer.shard_latents=1`, the defaults, leave it open. With `lm.devices` given, as many
    train as `trainer.devices` says. On a CPU these are no devices of their own, and a cache does not need them.

    Raises:
        SettingError: they ask for what cannot be had.
    """
    n, m = int(cfg.trainer.devices), int(cfg.trainer.get("shard_latents", 1))
    if len(saes) > 1 and n > 1:
        raise SettingError("hydra/launcher=shared_stream trains in one process: leave it out, or trainer=ddp.")
    for sae in saes:
        check_shards(sae.name, sae.n_latents, sae.shardable, m)
    alone = cfg.machine.gpu and not is_cached(cfg)
    lm = len(lm_devices(cfg)) if alone else 0
    typed = n > 1 or lm > 0 or len(saes) > 1
    shardable = all(sae.shardable for sae in saes)
    any_lm = alone and not lm and len(saes) == 1
    return Asked(n if typed else None, m if m > 1 or not shardable else None, None if any_lm else lm)


def is_cached(cfg: DictConfig) -> bool:
    return bool(cfg.data.get("_target_") == CACHED)
