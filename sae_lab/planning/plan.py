"""The plan of one stream: a run, or the runs of a sweep that share a pass over the language model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from omegaconf import DictConfig

from sae_lab.planning.asked import asked_for, check_planned, is_cached
from sae_lab.planning.disk import Harvest, check_cache, harvest_of
from sae_lab.planning.exchange import Exchange, dead_candidates, exchange
from sae_lab.planning.layouts import Asked, Layout, Option, cheapest, layouts
from sae_lab.planning.memory import dead_latents, lm_device_memory, process_memory
from sae_lab.planning.rates import Rates, forward_work, rates_of, step_work
from sae_lab.planning.sizes import Reading, SAESize, read_sizes, sae_size
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.screen import size_in_words
from sae_lab.sweeps.shared_stream import sites_of

MOST_DEVICES = 4096
"""Devices among which the smallest layout that fits is looked for."""
MULTIPLE = 1024
"""Numbers of latents that are multiples of it can be sharded in many ways."""


class Plan(NamedTuple):
    """What a stream takes."""

    name: str
    reading: Reading
    saes: list[SAESize]
    n_tokens: int
    gpus: int
    """Devices that may be used."""
    cached: bool
    """Whether the activations come from a cache."""
    chosen: Option
    fitting: list[Option]
    options: list[Option]
    exchange: Exchange
    dead_latents: float
    """Bytes of memory that latents take more, if they are dead."""
    dead_candidates: float
    """Bytes that a rank sends more in a step then."""
    harvest: Harvest
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
    for one in cfgs:
        check_planned(one)
        if is_cached(one):
            check_cache(one)
    reading, rates = joined([read_sizes(c, known) for c in cfgs], cfgs), rates_of(cfg, known)
    saes = [sae_size(c, read_sizes(c, known)) for c in cfgs]
    asked = asked_for(cfg, saes)
    options = all_options(cfg, reading, saes, rates, asked)
    memory = float(cfg.memory or cfg.machine.memory * cfg.machine.usable)
    fitting = [option for option in options if option.peak <= memory]
    if not fitting:
        least = min(option.peak for option in options)
        raise UserError(nothing_fits(cfg, reading, saes, rates, asked, least, memory))
    chosen = cheapest(fitting)
    data, latents, lm = chosen.layout
    exchanged = exchange(saes[0], cfg.batch_size, data, latents, reading.bytes_per_token, lm > 0)
    dead = max(dead_latents(sae.shard(latents)) for sae in saes)
    sent = max(dead_candidates(sae, cfg.batch_size, data, latents) for sae in saes)
    counts, layouts_ = (cfg.n_tokens, int(cfg.gpus), is_cached(cfg)), (chosen, fitting, options)
    return Plan(name, reading, saes, *counts, *layouts_, exchanged, dead, sent, harvest_of(cfg, reading, rates), rates)


def joined(readings: Sequence[Reading], cfgs: Sequence[DictConfig]) -> Reading:
    """Return one reading of all sites of several runs, each site once."""
    sites = {site for cfg in cfgs for site in sites_of(cfg) or ()}
    first = readings[0]
    n_sources = len(sites) if len(cfgs) > 1 and sites else first.n_sources
    return first._replace(n_layers=max(r.n_layers for r in readings), n_sources=n_sources)


def all_options(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, asked: Asked) -> list[Option]:
    """Return every layout that the settings allow, with what it takes; there is one at least."""
    devices = max(int(cfg.gpus), (asked.ranks or asked.latents or 1) + (asked.lm or 0))
    shares, f = math.gcd(int(cfg.batch_size), int(cfg.n_tokens)), math.gcd(*(sae.n_latents for sae in saes))
    return [option(cfg, reading, saes, rates, layout) for layout in layouts(devices, shares, f, asked)]


def option(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, layout: Layout) -> Option:
    """Return a layout with what it takes."""
    stages = seconds_of_stages(cfg, reading, saes, rates, layout)
    per_token = seconds_per_token(stages, layout, bool(cfg.machine.text_with_step), is_cached(cfg))
    memory = process_memory(cfg, reading, saes, layout, is_cached(cfg))
    lm_memory = lm_device_memory(cfg, reading) if layout.lm else {}
    hours = (around(cfg, reading, saes, rates, layout) + cfg.n_tokens * per_token) / 3600
    overrides = layout.overrides([] if is_cached(cfg) else cfg.lm.get("devices") or [])
    return Option(layout, memory, lm_memory, stages, per_token, hours, not cfg.machine.gpu, overrides)


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
    steps = sum(rates.step(step_work(sae, b)) for sae in own) * share
    stages["step"] = (steps + cfg.machine.loop_seconds * len(saes)) / cfg.batch_size
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


def around(cfg: DictConfig, reading: Reading, saes: list[SAESize], rates: Rates, layout: Layout) -> float:
    """Return the seconds before and after the training: start, calibration, evaluation and files.

    The calibration fills the blocks of its batches again and selects; the evaluation runs the whole model twice for the
    text, and once for each way to replace the activations, of which an SAE that selects over the batch has two. One
    process does both; on a CPU it has its share of the cores.
    """
    ranks = layout.data * layout.latents
    per_token = seconds_of_stages(cfg, reading, saes, rates, Layout())
    step = per_token.pop("step")
    calibration = min(cfg.calibration_batches * cfg.batch_size, cfg.n_tokens)
    filled = min(math.ceil(calibration / cfg.data.block_tokens) * cfg.data.block_tokens, cfg.n_tokens)
    whole = rates.forward(forward_work(reading.lm, reading.lm.n_layers))
    logits = rates.forward((2.0 * reading.lm.d * reading.lm.vocab_size, 4.0 * reading.lm.vocab_size))
    passes = 3 + 2 * len(saes)
    evaluation = cfg.data.n_eval_tokens * (passes * (whole + logits) + 2 * step)
    alone = (filled * sum(per_token.values()) + calibration * step + evaluation) * (1 if cfg.machine.gpu else ranks)
    start = cfg.machine.start_seconds + cfg.machine.member_seconds * (len(saes) - 1)
    start += cfg.machine.ranks_seconds * (ranks > 1)
    files = 16 * sum(sae.parameters for sae in saes) / cfg.machine.file_write
    return float(start + alone) + files


def nothing_fits(
    cfg: DictConfig,
    reading: Reading,
    saes: list[SAESize],
    rates: Rates,
    asked: Asked,
    least: float,
    memory: float,
) -> str:
    """Return the sentence about a run that fits no layout, with the smallest layout that would.

    Args:
        cfg, reading, saes, rates, asked: see all_options.
        least: the bytes of the layout that takes least.
        memory: the bytes that a device has.
    """
    said = (
        f"gpus={cfg.gpus} allows no layout that fits: {size_in_words(least)} at least would be in a memory of which "
        f"{size_in_words(memory)} can be filled"
    )
    f = saes[0].n_latents
    for n_latents in (f, -(-f // MULTIPLE) * MULTIPLE) if len(saes) == 1 else ():
        sae = saes[0]._replace(n_latents=n_latents)
        found = smallest(cfg, reading, sae, rates, memory, asked.lm or 0)
        if found is None:
            continue
        typed = "" if asked.ranks is None and asked.latents is None else f" {found.overrides()}"
        if n_latents == f:
            return f"{said}: give gpus={found.devices}{typed}, for {found} data x latents."
        return (
            f"{said}, and no number of shards divides n_latents={f} well enough: give n_latents={n_latents} "
            f"gpus={found.devices}{typed}, for {found} data x latents."
        )
    return f"{said}, and more devices do not change that: lower n_latents, data.block_tokens or batch_size."


def smallest(cfg: DictConfig, reading: Reading, sae: SAESize, rates: Rates, memory: float, lm: int) -> Layout | None:
    """Return the layout of the fewest devices that fits, with `lm` for the language model alone; None if none does."""
    shares, asked = math.gcd(int(cfg.batch_size), int(cfg.n_tokens)), Asked(None, None if sae.shardable else 1, lm)
    possible = layouts(MOST_DEVICES + lm, shares, sae.n_latents, asked)
    return next((one for one in possible if option(cfg, reading, [sae], rates, one).peak <= memory), None)
