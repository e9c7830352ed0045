"""Cost of a pursuit, in encoder products per step."""

import statistics
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from sae_lab.ops.matmul import linear
from sae_lab.ops.pursuit import METHODS, Dictionary, pursue
from sae_lab.runtime.device import resolve_device, synchronized_time
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.screen import console, under
from sae_lab.studies.step_cost import Step, superposed_rows, write_figures


def benchmark_pursuit(cfg: DictConfig) -> dict[str, Any]:
    """Time a pursuit of one batch with and without the Gram matrix. Prints the figures and writes benchmark.json."""
    keep_freed_memory()
    device = torch.device(resolve_device(cfg.device))
    if cfg.pursuit not in METHODS:
        raise UserError(f"pursuit={cfg.pursuit} is not known: choose one of {', '.join(METHODS)}.")
    y = superposed_rows(cfg.batch_size, cfg.n_sources, cfg.d_in).flatten(1).to(device)
    rows = torch.randn(cfg.n_latents, y.shape[1], generator=torch.Generator().manual_seed(cfg.seed)).to(device)
    gram, products = Dictionary(rows), Dictionary(rows, gram=False)
    steps: dict[str, Step] = {
        "product": lambda: linear(y, rows),
        "gram matrix": lambda: Dictionary(rows),
        "pursuit": lambda: pursue(cfg.pursuit, y, gram, cfg.k),
        "pursuit without": lambda: pursue(cfg.pursuit, y, products, cfg.k),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + cfg.repeats):
        for name, step in steps.items():
            start = synchronized_time(device)
            step()
            seconds[name].append(synchronized_time(device) - start)
    ms = {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}
    figures = {"ms": ms, "products_per_step": {n: ms[n] / ms["product"] / cfg.k for n in ms if n.startswith("pursuit")}}
    result = Table()
    for column in ("", "ms", "products a step"):
        result.add_column(column, justify="right" if column else "left")
    for name, value in ms.items():
        ratio = figures["products_per_step"].get(name)
        result.add_row(name, f"{value:,.1f}", "" if ratio is None else f"{ratio:.2f}")
    title = f"{cfg.pursuit}, d {cfg.d_in:,}, f {cfg.n_latents:,}, k {cfg.k}, b {cfg.batch_size:,}"
    console.print(under(title, result))
    return write_figures(figures, cfg)
