"""A cache of activations: what its harvest takes, and whether one that is there is that of a run."""

from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from sae_lab.cache.shards import Manifest
from sae_lab.cache.store import Store
from sae_lab.lm.sites import site_names
from sae_lab.planning.rates import Rates, forward_work
from sae_lab.planning.sizes import Reading, models_of
from sae_lab.runtime.checks import show
from sae_lab.runtime.errors import SettingError, UserError


class Harvest(NamedTuple):
    """What a harvest of all tokens takes."""

    bytes: float
    devices: int
    tokens_per_second: float
    hours: float
    limit: str


def harvest_of(cfg: DictConfig, reading: Reading, rates: Rates) -> Harvest:
    """Return what a harvest takes on all devices, one worker each.

    A worker reads text and runs the language model in turns; all workers write to one disk.
    """
    workers = int(cfg.gpus) if cfg.machine.gpu else 1
    lm = reading.n_models * rates.forward(forward_work(reading.lm, reading.n_layers))
    text = 1 / rates.text
    stages = {
        "language model" if lm > text else "text": (lm + text) / workers,
        "cache write": reading.bytes_per_token / rates.cache_write,
    }
    limit = max(stages, key=lambda name: stages[name])
    hours = (float(cfg.machine.start_seconds) + cfg.n_tokens * stages[limit]) / 3600
    return Harvest(float(cfg.n_tokens * reading.bytes_per_token), workers, 1 / stages[limit], hours, limit)


def check_cache(cfg: DictConfig) -> None:
    """Check that the cache at `data.path`, if it is on this machine already, has what a run reads.

    Raises:
        UserError: it is of another model, lacks a site, or ends before the run.
    """
    if OmegaConf.is_missing(cfg.data, "path"):
        raise SettingError("data.path has no value: give data.path=...")
    manifest = None if "://" in str(cfg.data.path) else Manifest.read(Store(cfg.data.path))
    if manifest is None:
        return
    models, place = models_of(cfg), f"data.path={cfg.data.path}"
    name = " and ".join(str(model.name) for model in models.values())
    if manifest.model != name:
        raise UserError(
            f"{place} holds activations of {manifest.model}, not of {name}: choose another lm=... or cache."
        )
    sides = [f"{key.removeprefix('lm.')}." if len(models) > 1 else "" for key in models]
    sites = [f"{side}{s}" for side, lm in zip(sides, models.values(), strict=True) for s in site_names(lm.sites)]
    there = manifest.key["lm.sites"]
    if missing := [site for site in sites if site not in there]:
        raise UserError(f"{place} holds {show(there)}, not {show(missing)}: choose lm.sites among these.")
    n = int(manifest.key.get("n_tokens", manifest.rows))
    if n < cfg.n_tokens and not cfg.data.repeat:
        raise UserError(
            f"{place} holds {n:,} tokens, fewer than n_tokens={cfg.n_tokens}: lower n_tokens, or give data.repeat=true."
        )
