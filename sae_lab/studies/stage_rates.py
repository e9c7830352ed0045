"""Speed of each stage of a run in tokens/s, to see which one limits it.

    text          rows of tokens, as a streaming run takes them: from the store, verified; or read and tokenized
    forward       the language model, stopped at the last site, on tokens in memory
    harvest       text -> tokens -> language model -> kept activations, as in a streaming run
    cache write   activations in memory -> shards on disk, each flushed
    cache read    shards -> shuffled blocks -> batches; the files are in the page cache, as for all but the first job of
                  a sweep
    step          a training step of the SAE on a batch in memory
    streaming     harvest, shuffle and step: a streaming run
    cached        cache read and step: a run from the cache

The stages alternate, one slice each, so that other load on the machine slows all of them equally. The ratios are more
reliable than the absolute numbers.
"""

import statistics
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.table import Table

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.building import build_data, require_text
from sae_lab.activations.data import ActivationData
from sae_lab.cache.reader import Cache, CachedSource
from sae_lab.cache.worker import gather
from sae_lab.cache.writer import CacheWriter
from sae_lab.runtime.device import synchronized_time
from sae_lab.runtime.files import write_json
from sae_lab.runtime.plain_text import plural
from sae_lab.runtime.screen import console, track, under
from sae_lab.studies.step_cost import training_step
from sae_lab.text.rows import NextRows
from sae_lab.training.run import build_sae

Stage = Callable[[], int]  # processes one slice and returns its number of tokens


def measure_throughput(cfg: DictConfig) -> dict[str, Any]:
    """Measure the tokens/s of each stage. Prints the figures and writes throughput.json."""
    data = require_text(build_data(cfg), "throughput")
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run_dir) as folder:  # on the disk of the run folder, not in /tmp
        rates = measure_rates(build_stages(cfg, data, folder), cfg.slices, data.lm.device)
    cuda = data.lm.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else plural(torch.get_num_threads(), "CPU thread")
    figures = {"tokens_per_second": rates, "device": device, "config": OmegaConf.to_container(cfg, resolve=True)}
    console.print(rates_table(figures))
    write_json(run_dir / "throughput.json", figures)
    return figures


def build_stages(cfg: DictConfig, data: ActivationData, folder: str) -> dict[str, Stage]:
    """Return the stages by name. A slice is `slice_tokens` tokens, rounded up to whole blocks."""
    block_rows = data.stream.block_rows
    n_batches = -(-cfg.slice_tokens // block_rows) * block_rows // data.batch_size
    n_passes = -(-cfg.slice_tokens // (data.lm_batch_rows * data.seq_len))
    tokens = data.text.first_rows(data.lm_batch_rows)
    harvest = iter(data.source())
    writer = CacheWriter(data, folder, cfg.slice_tokens, cfg.slice_tokens)
    shard = gather(data, NextRows(data.rows(), -(-cfg.slice_tokens // data.seq_len)), lambda n: None)
    writer.build()
    rows = data.rows()
    source = CachedSource(Cache(folder), data.lm_batch_rows * data.seq_len, 0, True, data.lm.device)
    streamed = data.new_stream(data.prefetch)
    cached = ShuffledBlocks(source, data.block_tokens, data.batch_size, seed=0)
    batch = next(data.new_stream())
    sae = build_sae(cfg, data).to(data.lm.device)
    step = training_step(sae, cfg, batch)

    def run(stream: ShuffledBlocks, train: bool) -> int:
        for x in islice(stream, n_batches):
            batch.copy_(x)
            if train:
                step()
        stream.close()  # ends its prefetch thread, if it has one
        return n_batches * data.batch_size

    return {
        "text": lambda: sum(rows.take(data.lm_batch_rows).numel() for _ in range(n_passes)),
        "forward": lambda: sum(data.lm.activations(tokens)[..., 0, 0].numel() for _ in range(n_passes)),
        "harvest": lambda: sum(len(chunk.rows) for chunk in islice(harvest, n_passes)),
        "cache write": lambda: writer.files.write_shard("written.safetensors", shard, cfg.slice_tokens).rows,
        "cache read": lambda: run(cached, train=False),
        "step": lambda: sum(len(batch) for _ in range(n_batches) if step() is None),
        "streaming": lambda: run(streamed, train=True),
        "cached": lambda: run(cached, train=True),
    }


def measure_rates(named: dict[str, Stage], slices: int, device: torch.device) -> dict[str, float]:
    """Return the median tokens/s of each stage over its slices, after one untimed slice."""
    rates: dict[str, list[float]] = {name: [] for name in named}
    for _ in track(range(1 + slices), "measuring"):
        for name, stage in named.items():
            start = synchronized_time(device)
            n = stage()
            rates[name].append(n / (synchronized_time(device) - start))
    return {name: statistics.median(of_slices[1:]) for name, of_slices in rates.items()}


def rates_table(figures: dict[str, Any]) -> Group:
    """Return the figures as a table, one line per stage."""
    result = Table()
    for column in ("stage", "tokens/s", "x forward"):
        result.add_column(column, justify="left" if column == "stage" else "right")
    rates = figures["tokens_per_second"]
    for name, rate in rates.items():
        result.add_row(name, f"{rate:,.0f}", f"{rate / rates['forward']:.2f}")
    return under(f"stages on {figures['device']}", result)
