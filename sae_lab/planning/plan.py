"""The plan of one stream: a run, or the runs of a sweep that share a pass over the language model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from omegaconf import DictConfig

from sae_lab.planning.exchange import Exchange, exchange
from sae_lab.planning.layouts import Layout, Option, cheapest, layouts
from sae_lab.planning.memory import dead_latents, lm_device_memory, process_memory
from sae_lab.planning.rates import Rates, forward_work, rates_of, step_work
from sae_lab.planning.sizes import Reading, SAESize, read_sizes, sae_size
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.screen import gb
from sae_lab.sweeps.shared_stream import sites_of

CACHED, TENSOR = "sae_lab.cache.data.CachedData", "sae_lab.activations.tensor.TensorData"
MOST_DEVICES = 4096
"""Devices among which the smallest layout that fits is looked for."""


class Plan(NamedTuple):
    """What a stream takes."""

    name: str
    reading: Reading
    saes: list[SAESize]
    n_tokens: int
    chosen: Option
    options: list[Option]
    exchange: Exchange
    dead_latents: float
    cache: float
    """Bytes of a cache of all tokens."""
    rates: Rates


def known_models() -> dict[str, dict[str, int]]:
    """Return the sizes of models by name, for those whose config is not on this machine."""
    return yaml.safe_load((Path(__file__).parent / "models.yaml").read_text())


def plan_stream(name: str, cfgs: Sequence[DictConfig], known: Mapping[str, Mapping[str, int]]) -> Plan:
    """Plan runs that train side by side on one stream of activations.

    Raises:
        UserError: no layout of the devices fits. It names the smallest one that would.
    """
    cfg = cfgs[0]
    check_planned(cfg)
    reading, rates = joined([read_sizes(c, known) for c in cfgs], cfgs), rates_of(cfg, known)
    saes = [sae_size(c, read_sizes(c, known)) for c in cfgs]
    memory = float(cfg.memory or cfg.machine.memory * cfg.machine.usable)
    options = list(all_options(cfg, reading, saes, rates, devices_of(cfg, len(cfgs))))
    chosen = cheapest(options, memory)
    if chosen is None:
        raise UserError(nothing_fits(cfg, reading, saes, rates, memory))
    layout = chosen.layout
    exchanged = exchange(saes[0], cfg.batch_size, layout.data, layout.latents, reading.bytes_per_token, layout.lm > 0)
    dead = max(dead_latents(sae.shard(layout.latents)) for sae in saes)
    disk = float(cfg.n_tokens * reading.bytes_per_token)
    return Plan(name, reading, saes, cfg.n_tokens, chosen, options, exchanged, dead, disk, rates)


def check_planned(cfg: DictConfig) -> None:
    """Raise a SettingError for runs whose work is not known."""
    if cfg.data.get("_target_") == TENSOR:
        raise SettingError("plan needs the language model that activations come from: data=tensor has none.")
    if cfg.loss:
        raise SettingError(
            f"loss={cfg.loss} runs the language model in every step, which plan does not know: leave it out."
        )


def joined(readings: Sequence[Reading], cfgs: Sequence[DictConfig]) -> Reading:
    """Return one reading of all sites of several runs, each site once."""
    sites = {site for cfg in cfgs for site in sites_of(cfg) or ()}
    first = readings[0]
    n_sources = len(sites) if len(cfgs) > 1 and sites else first.n_sources
    return first._replace(n_layers=max(r.n_layers for r in readings), n_sources=n_sources)


def all_options(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, devices: int) -> Iterator[Option]:
    """Yield every layout of at most so many devices with what it takes."""
    f = min(sae.n_latents for sae in saes)
    for layout in layouts(devices, cfg.batch_size, cfg.n_tokens, f, cfg.machine.gpu and not is_cached(cfg)):
        if layout.latents > 1 and not saes[0].shardable:
            continue
        if is_asked_for(layout, cfg):
            yield option(cfg, reading, saes, rates, layout)


def is_asked_for(layout: Layout, cfg: DictConfig) -> bool:
    """Return whether a layout agrees with the settings of `train` that choose one, where they are not the defaults."""
    m, lm = cfg.trainer.get("shard_latents", 1), len(cfg.lm.get("devices") or ())
    of_ranks = cfg.trainer.devices in (1, layout.data * layout.latents)
    return of_ranks and m in (1, layout.latents) and lm in (0, layout.lm)


def devices_of(cfg: DictConfig, n_runs: int) -> int:
    """Return how many devices a stream may have: one if several runs share it."""
    asked = int(cfg.trainer.devices) + len(cfg.lm.get("devices") or ())
    return max(int(cfg.gpus), asked) if n_runs == 1 else 1


def is_cached(cfg: DictConfig) -> bool:
    return bool(cfg.data.get("_target_") == CACHED)


def option(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, layout: Layout) -> Option:
    """Return a layout with what it takes."""
    stages = seconds_of_stages(cfg, reading, saes, rates, layout)
    per_token = seconds_per_token(stages, layout, bool(cfg.machine.text_with_step), is_cached(cfg))
    memory = process_memory(cfg, reading, saes, layout, is_cached(cfg))
    lm_memory = lm_device_memory(cfg, reading) if layout.lm else {}
    hours = (around(cfg, reading, saes, rates) + cfg.n_tokens * per_token) / 3600
    return Option(layout, memory, lm_memory, stages, per_token, hours, not cfg.machine.gpu)


def seconds_of_stages(
    cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, layout: Layout
) -> dict[str, float]:
    """Return the seconds per token of each stage, on all devices together.

    Processes of a CPU share its cores, so what n of them compute takes as long as in one.
    """
    n = layout.data * layout.latents
    together = n if cfg.machine.gpu else 1
    stages = {}
    if is_cached(cfg):
        stages["cache read"] = reading.bytes_per_token / rates.cache_read
    else:
        lm = reading.n_models * rates.forward(forward_work(reading.lm, reading.n_layers))
        stages["text"] = 1 / (rates.text * (layout.lm or together))
        stages["language model"] = lm / (layout.lm or together)
    b = cfg.batch_size / layout.data
    own = [sae.shard(layout.latents) for sae in saes]
    share = 1 if cfg.machine.gpu else n
    stages["step"] = sum(rates.step(step_work(sae, b)) for sae in own) * share / cfg.batch_size
    traffic = exchange(saes[0], cfg.batch_size, layout.data, layout.latents, reading.bytes_per_token, layout.lm > 0)
    link = cfg.machine.link if layout.devices <= cfg.machine.node else cfg.machine.node_link
    if traffic.operations:
        stages["exchange"] = traffic.seconds(link, cfg.machine.exchange_seconds) / cfg.batch_size
    return stages


def seconds_per_token(stages: Mapping[str, float], layout: Layout, text_with_step: bool, cached: bool) -> float:
    """Return the seconds per token of the run.

    Training and the language model take turns on devices that they share, and run side by side on devices of their own.
    Text is read beside both on a machine whose devices are GPUs.
    """
    training = stages["step"] + stages.get("exchange", 0.0) + stages.get("cache read", 0.0)
    lm, text = stages.get("language model", 0.0), stages.get("text", 0.0)
    if cached:
        return training
    if text_with_step:
        lm, text = lm + text, 0.0
    return max(training, lm, text) if layout.lm else max(training + lm, text)


def around(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates) -> float:
    """Return the seconds before and after the training: start, calibration and evaluation.

    The calibration reads its batches again and selects; the evaluation runs the whole model twice for the text, and
    once for each way to replace the activations, of which an SAE that selects over the batch has two.
    """
    per_token = seconds_of_stages(cfg, reading, saes, rates, Layout())
    calibration = min(cfg.calibration_batches * cfg.batch_size, cfg.n_tokens) * sum(per_token.values())
    whole = rates.forward(forward_work(reading.lm, reading.lm.n_layers))
    logits = rates.forward((2.0 * reading.lm.d * reading.lm.vocab_size, 4.0 * reading.lm.vocab_size))
    passes = 3 + 2 * len(saes)
    evaluation = cfg.data.n_eval_tokens * (passes * (whole + logits) + 2 * per_token["step"])
    return float(cfg.machine.start_seconds) + calibration + evaluation


def nothing_fits(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, memory: float) -> str:
    """Return the sentence about a run that fits no layout, with the smallest layout that would."""
    allowed = all_options(cfg, reading, saes, rates, devices_of(cfg, len(saes)))
    least = min(allowed, key=lambda one: one.peak)
    said = (
        f"gpus={cfg.gpus} allows no layout that fits: {gb(least.peak)} GB at least would be in a memory of which "
        f"{gb(memory)} GB can be filled"
    )
    found = smallest(cfg, reading, saes, rates, memory) if len(saes) == 1 else None
    if found is not None:
        return f"{said}: give gpus={found.devices}, for {found} data x latents."
    return f"{said}, and more devices do not change that: lower n_latents, data.block_tokens or batch_size."


def smallest(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, memory: float) -> Layout | None:
    """Return the layout of the fewest devices that fits; None if none does."""
    for layout in layouts(MOST_DEVICES, cfg.batch_size, cfg.n_tokens, saes[0].n_latents, lm_alone=False):
        fits = option(cfg, reading, saes, rates, layout).peak <= memory
        if fits and (layout.latents == 1 or saes[0].shardable):
            return layout
    return None
