"""Bytes of a process at its peak, by what takes them.

Counted: parameters, gradients and optimizer, the language model, blocks, matrices of a step. Measured once for a
machine: the process before the run; what reading text leaves behind, and each SAE's log, auxiliary loss and metrics;
the evaluation. A checkpoint is written from the tensors themselves and takes nothing (measured).

On a CPU memory that was freed stays with the process (runtime/memory.py), so what is needed one after the other counts
once: the largest of it. Latents that are dead take more (see `dead_latents`), which is not part of the peak: it depends
on how the training goes.
"""

import math
from typing import Any

from omegaconf import DictConfig

from sae_lab.activations.passes import CPU_TOKENS, GPU_TOKENS, MEMORY_SHARE, tokens_that_fit
from sae_lab.ops.selection import PIECE
from sae_lab.planning.layouts import Layout
from sae_lab.planning.rates import BLOCK_BYTES
from sae_lab.planning.sizes import Reading, SAESize

DENSE_MATRICES = 6
"""(b, f) matrices of 4 bytes that exist at once without codes by active entry: h, z, and the gradients' parts."""
LEAST_ROWS = 512
"""Rows of a piece of h; see ops/selection.py."""
SLICES = 4 * 64e6
"""Four float32 copies of a slice of logits; see evaluation/evaluator.py."""


def process_memory(
    cfg: DictConfig, reading: Reading, saes: list[SAESize], layout: Layout, cached: bool
) -> dict[str, float]:
    """Return the bytes of a process that trains these SAEs side by side, by what takes them, at its peak.

    Args:
        cfg: the config of the first of them.
        reading: all sites of all of them.
        saes: whole SAEs; a process holds its shard of each.
        layout: the processes.
        cached: activations come from a cache.
    """
    machine = cfg.machine
    own = [sae.shard(layout.latents) for sae in saes]
    holds_lm = layout.lm == 0
    at_once = max(1, len(cfg.lm.get("devices") or ()) // layout.data // layout.latents)  # on a CPU, where they are here
    parts = {"process": float(machine.process)}
    parts |= {"language model": lm_bytes(reading)} if holds_lm else {}
    pass_bytes = 0.0 if cached or not holds_lm else at_once * pass_memory(cfg, reading)
    parts |= {"parameters": 4.0 * sum(s.parameters for s in own) + sum(s.buffers for s in own)}
    parts |= {"optimizer": 8.0 * sum(s.parameters for s in own)}
    block = block_memory(cfg, reading, layout)
    step = max(step_memory(s, cfg, layout) for s in own)
    by_row = machine.gpu and layout.data * layout.latents == 1  # see has_fixed_size in training/step.py
    gradients = 4.0 * sum(s.parameters - (s.rowwise if by_row else 0) for s in own)
    training = {"gradients": gradients, "block": block, "step": step, "passes": pass_bytes}
    evaluation = evaluation_memory(cfg, reading)
    if evaluation > sum(training.values()) - gradients:
        training = {"gradients": gradients, "evaluation": evaluation}
    kept = {"text": 0.0 if cached else float(machine.get("text_memory", 0.0))}
    kept |= {"members": len(saes) * float(machine.get("member_memory", 0.0)) / layout.data}
    return {name: size for name, size in (parts | kept | training).items() if size}


def lm_bytes(reading: Reading) -> float:
    """Return the bytes of the language model's weights."""
    return float(reading.n_models * reading.lm.parameters * reading.itemsize)


def lm_device_memory(cfg: DictConfig, reading: Reading) -> dict[str, float]:
    """Return the bytes of a device that runs the language model alone."""
    parts = {"process": float(cfg.machine.process), "language model": lm_bytes(reading)}
    return parts | {"passes": pass_memory(cfg, reading)}


def pass_memory(cfg: DictConfig, reading: Reading) -> float:
    """Return the bytes that a forward pass up to the last site takes beside the weights."""
    most = cfg.data.get("lm_batch_tokens", "auto")
    per_token = BLOCK_BYTES / 4 * reading.lm.d * reading.itemsize + reading.bytes_per_token
    tokens: Any = most
    if cfg.data.get("lm_batch_rows"):
        tokens = cfg.data.lm_batch_rows * cfg.seq_len
    elif most == "auto":
        share = cfg.machine.memory * MEMORY_SHARE
        tokens = tokens_that_fit(GPU_TOKENS, per_token, share) if cfg.machine.gpu else CPU_TOKENS
    return float(tokens * per_token)


def evaluation_memory(cfg: DictConfig, reading: Reading) -> float:
    """Return the bytes that the evaluation takes beside the model and the SAE."""
    n, machine = cfg.data.n_eval_tokens, cfg.machine
    if machine.gpu:
        return SLICES + 2 * pass_memory(cfg, reading)
    return float(machine.evaluation * min(1.0, n / CPU_TOKENS) + machine.evaluation_token * n)


def block_memory(cfg: DictConfig, reading: Reading, layout: Layout) -> float:
    """Return the bytes of the blocks of activations that are shuffled: of the rows that this process trains on."""
    rows = min(cfg.data.block_tokens, math.ceil(cfg.n_tokens / cfg.batch_size) * cfg.batch_size)
    prefetch = cfg.data.prefetch is True or (cfg.data.prefetch == "auto" and cfg.machine.gpu)
    return float((1 + prefetch) * max(rows, cfg.batch_size) * reading.bytes_per_token / layout.data)


def step_memory(sae: SAESize, cfg: DictConfig, layout: Layout) -> float:
    """Return the bytes of a step beside parameters, gradients and the optimizer's state.

    Rows are those of a rank. With codes by active entry a GPU holds h as a whole. A CPU holds a piece of h, a mask of
    it and the maxima of its blocks while it encodes, when the SAE has no gradients yet; then two copies of a matrix
    while Adam updates it.
    """
    b = cfg.batch_size / layout.data / cfg.trainer.micro_batches
    rows = 6 * 4.0 * b * sae.width
    if not sae.sparse:
        return rows + DENSE_MATRICES * 4.0 * b * sae.n_latents
    entries = 60.0 * b * sae.k  # indices of 8 bytes in two orders, values and their gradients
    if cfg.machine.gpu:
        half = "16" in str(cfg.trainer.precision)
        return rows + entries + (2 if half else 4) * b * sae.n_latents
    piece = max(min(b, LEAST_ROWS) * sae.n_latents, PIECE["cpu"])
    encoding = 6.0 * min(piece, b * sae.n_latents) - 4.0 * sae.parameters
    return rows + entries + max(encoding, 4.0 * sae.by_latent)


def dead_latents(sae: SAESize) -> float:
    """Return the bytes that the auxiliary loss adds if all latents are dead: their rows, gradients and both as wholes.

    Where the number of dead latents changes from step to step, a CPU's allocator may take several times as much.
    """
    return 4.0 * 4 * sae.by_latent
