"""Cost of a training step: a lower bound, a dense reference, our step, and our step in the Lightning loop.

    floor           one encoder product and one fused Adam step on the same parameters, in the same precision. Uses the
                    fastest product (ops/matmul.py)
    torch_floor     the same with torch's own `x @ W`, where that is another one
    dense           a step by plain autograd of the dense formula: the whole h, torch.topk, five dense products
    step            our step: forward, losses, backward, projection, optimizer, renormalization; on a GPU as a CUDA
                    graph where possible
    eager_step      on a GPU, our step launched kernel by kernel
    lightning_step  our step as `train` runs it: SAEModule in its Trainer, on batches in memory

All are measured in one process and alternate, so that other load on the machine slows all of them equally. The ratios
are more reliable than the absolute numbers. On a GPU, several steps follow each other before the host waits, as in
training: the host prepares a step while the GPU computes the one before.
"""

import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from sae_lab.ops.matmul import Products, float32_products, linear
from sae_lab.ops.sparse import Code
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.build import build
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.device import resolve_device, synchronized_time
from sae_lab.runtime.files import write_json
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.plain_text import plural
from sae_lab.runtime.screen import console, under
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.linear import LinearSAE
from sae_lab.training import capture
from sae_lab.training.capture import Capture, choose_products, prepare_step
from sae_lab.training.module import SAEModule
from sae_lab.training.step import TrainingStep

WARM = {"cpu": 2, "cuda": 2 + capture.WARM}
"""Untimed steps of each kind by device; on a GPU the first ones come before the capture."""
AT_ONCE = {"cpu": 1, "cuda": 10}
"""Steps by device between two waits of the host."""
LOG_EVERY = 50
"""As in a long run. A row of the log makes the host wait."""

NAMES = {
    "floor": "floor: encoder product + fused Adam",
    "torch_floor": "the same by torch's x @ W",
    "dense": "dense reference step",
    "step": "our step",
    "eager_step": "our step, not captured",
    "lightning_step": "our step in the Lightning loop",
}


Step = Callable[[], Any]
Measured: TypeAlias = Annotated[
    Literal["32-true", "bf16-mixed"], ErrorMessage("is not measured here: choose 32-true or bf16-mixed")
]
"""The precision of a step without loss scaling."""


def benchmark_step(cfg: DictConfig) -> dict[str, Any]:
    """Time the steps for one size and one SAE. Prints the figures and writes benchmark.json."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")  # on purpose
    device = resolve_device(cfg.device)
    x = superposed_rows(cfg.batch_size, cfg.n_sources, cfg.d_in).to(device)
    make = partial(build_sae, cfg, device)
    sae = make()
    ours = training_step(sae, cfg, x, products=cfg.trainer.products)
    peak = peak_memory_mb(ours, device)  # before the other steps: on a CPU it is the peak of the whole process
    read = x[:, : sae.n_inputs or cfg.n_sources]
    steps = {"floor": floor_step(cfg, read, linear), "step": ours}
    if device == "cpu":
        steps["torch_floor"] = floor_step(cfg, read, F.linear)
    if cfg.dense and isinstance(sae, LinearSAE) and sae.layers.n_layers == 1:  # others have no single dense formula
        steps["dense"] = training_step(make(), cfg, x, dense_forward, False, cfg.trainer.products)
    if device == "cuda":
        steps["eager_step"] = training_step(make(), cfg, x, capturing=False, products=cfg.trainer.products)
    times = time_interleaved(steps, make(), cfg, x)
    figures: dict[str, Any] = {f"{name}_ms": times.get(name) for name in NAMES}
    figures["peak_memory_mb"] = peak
    figures["tokens_per_second"] = 1e3 * cfg.batch_size / times["step"]
    figures["device"] = (
        torch.cuda.get_device_name() if device == "cuda" else plural(torch.get_num_threads(), "CPU thread")
    )
    write_figures(figures, cfg)
    console.print(figures_table(figures))
    return figures


def write_figures(figures: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """Write the figures with their config to benchmark.json, and return both."""
    figures |= {"config": OmegaConf.to_container(cfg, resolve=True)}
    write_json(Path(cfg.run_dir) / "benchmark.json", figures)
    return figures


def superposed_rows(n_rows: int, n_sources: int, d_in: int) -> Float[Tensor, "b s d"]:
    """Draw rows that resemble a language model's: sparse sums of more directions than dimensions, with some noise."""
    generator = torch.Generator().manual_seed(0)
    width, n_directions = n_sources * d_in, max(2048, 2 * n_sources * d_in)
    directions = F.normalize(torch.randn(n_directions, width, generator=generator), dim=-1)
    active = torch.rand(n_rows, n_directions, generator=generator) < 20 / n_directions
    strengths = 3 * active * torch.rand(n_rows, n_directions, generator=generator)
    noise = 0.05 * torch.randn(n_rows, width, generator=generator)
    return (strengths @ directions + noise).view(n_rows, n_sources, d_in)


def build_sae(cfg: DictConfig, device: str) -> BaseSAE:
    """Build the SAE with `dead_share` of its latents dead, and no others during the measurement."""
    sae: BaseSAE = build(cfg, "sae", d_in=cfg.d_in, n_latents=cfg.n_latents, n_sources=cfg.n_sources)
    for part in sae.modules():
        if isinstance(part, LinearSAE):
            dead = slice(0, int(cfg.dead_share * cfg.n_latents))
            part.dead_after = 10**9
            part.batches_since_fired[dead] = part.dead_after
            with torch.no_grad():
                part.W_enc[dead] *= 1e-3  # too small to be among the k largest
    return sae.to(device)


def training_step(
    sae: BaseSAE,
    cfg: DictConfig,
    x: Tensor,
    forward: Callable[[Any, Tensor], SAEOutput] = nn.Module.__call__,
    capturing: Capture = "auto",
    products: Literal["auto"] | Products = "auto",
) -> Step:
    """Return a function that takes a whole training step, as SAEModule does."""
    step = TrainingStep(sae, build_optimizer(cfg)(list(sae.parameters())), forward=forward)
    step = prepare_step(step, capturing, products)

    def take() -> None:
        with autocast(cfg.precision, x):
            step(x)

    return take


def build_optimizer(cfg: DictConfig) -> Callable[..., torch.optim.Optimizer]:
    """Return the config's optimizer with a learning rate so small that the weights, and so the work, do not change."""
    return partial(build(cfg, "optimizer"), lr=1e-7)


def dense_forward(sae: LinearSAE, x: Tensor) -> SAEOutput:
    """Run the forward pass in plain torch, with h and the code as dense matrices."""
    sae.sources.observe(x)
    read, target = sae.sources(x)
    inputs, center, W = sae.encoder(read)
    h = F.linear((inputs - center).flatten(1), W.flatten(1), sae.b_enc)
    code = dense_code(sae, h)
    sae.observe(code)
    return sae.output(read, target, code, h)


def dense_code(sae: LinearSAE, h: Float[Tensor, "b f"]) -> Code:
    """Keep the k largest entries of relu(h), signed of |h|, of each row; of the whole batch for a batch-wise rule."""
    k = sae.config.get("k")
    if k is None:
        return sae.activate(h)
    rows = h if sae.signed else h.relu()
    rows = rows.view(1, -1) if sae.batch_rule else rows
    kept = rows.abs().topk(int(k * len(h) / len(rows)), dim=-1).indices
    return torch.zeros_like(rows).scatter(-1, kept, rows.gather(-1, kept)).view_as(h)


def floor_step(cfg: DictConfig, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return a step of one product x Wᵀ in the given precision and one fused Adam step on the SAE's parameter count."""
    dtype = torch.bfloat16 if cfg.precision == "bf16-mixed" else torch.float32
    rows, W = x.flatten(1).to(dtype), torch.randn(cfg.n_latents, x[0].numel(), device=x.device).to(dtype)
    parameters = nn.Parameter(torch.randn(2 * W.numel(), device=x.device))
    parameters.grad = torch.randn_like(parameters)
    adam = torch.optim.Adam([parameters], lr=1e-4, fused=True)
    products = choose_products(cfg.trainer.products, x.is_cuda, None)

    def step() -> None:
        with float32_products(products):
            product(rows, W)
        adam.step()

    return step


@check_arguments
def autocast(precision: Measured, x: Tensor) -> AbstractContextManager:
    """Return the autocast context of a precision."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


class Stream:
    """Yields batches for Lightning, and times the other steps between two batches.

    Lightning asks for one batch per step, so the time from yielding batches to the next request is that of as many
    steps with the overhead of the loop.
    """

    def __init__(self, x: Tensor, others: dict[str, Step], repeats: int):
        self.x, self.others, self.at_once = x, others, AT_ONCE[x.device.type]
        self.rounds = WARM[x.device.type] + repeats + 1  # Lightning fetches two batches before the first step
        self.seconds: dict[str, list[float]] = {name: [] for name in (*others, "lightning_step")}

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.rounds):
            for name, step in self.others.items():
                with self.timed(name):
                    for _ in range(self.at_once):
                        step()
            with self.timed("lightning_step"):
                for _ in range(self.at_once):
                    yield self.x

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time as many steps as follow each other before the host waits."""
        start = synchronized_time(self.x.device)
        yield
        self.seconds[name].append((synchronized_time(self.x.device) - start) / self.at_once)


def time_interleaved(steps: dict[str, Step], sae: BaseSAE, cfg: DictConfig, x: Tensor) -> dict[str, float]:
    """Return the median milliseconds of each step, and of a training step of `sae` in the Lightning loop."""
    stream = Stream(x, steps, cfg.repeats)
    module = SAEModule(sae, build_optimizer(cfg), partial(build(cfg, "schedule"), n_steps=10**6))
    warm, n_steps = WARM[x.device.type], stream.rounds * stream.at_once
    accelerator = "cuda" if x.is_cuda else "cpu"
    options = {"accelerator": accelerator, "precision": cfg.precision}
    options |= {"checkpoint_every": 10**9, "log_every": LOG_EVERY}
    trainer = build(cfg, "trainer")(run_dir=Path(cfg.run_dir), n_steps=n_steps, callbacks=[], **options)
    trainer.fit(module, stream)
    return {name: 1e3 * statistics.median(seconds[warm:]) for name, seconds in stream.seconds.items()}


def peak_memory_mb(step: Step, device: str) -> float:
    """Take the untimed steps, and return the peak memory: of tensors on a GPU, of the process on a CPU."""
    for i in range(WARM[device]):
        step()
        if i == 0 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # without what Triton held while it tuned the kernels, 256 MB
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def figures_table(figures: dict[str, Any]) -> Group:
    """Return the figures as a table, one line per step."""
    cfg = figures["config"]
    size = ", ".join(f"{key} {cfg[key]}" for key in ("d_in", "n_latents", "k", "batch_size", "precision"))
    title = f"{cfg['sae']['_target_'].rpartition('.')[2]}, {size}, {figures['device']}"
    memory = f"peak memory of our step: {figures['peak_memory_mb']:,.0f} MB"
    result = Table(caption=memory, caption_justify="left")
    for column in ("", "ms", "x floor", "tokens/s"):
        result.add_column(column, justify="right" if column else "left")
    for name, meaning in NAMES.items():
        ms = figures[f"{name}_ms"]
        if ms is not None:
            ratio = ms / figures["floor_ms"]
            result.add_row(meaning, f"{ms:,.1f}", f"{ratio:.2f}", f"{1e3 * cfg['batch_size'] / ms:,.0f}")
    return under(title, result)
