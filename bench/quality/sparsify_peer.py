"""TopK of sparsify, by the steps of its Trainer, which can be called with a language model only."""

import contextlib
import io
import os
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
import torch
from coding import Coder, Rows, coder_of
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

if not torch.cuda.is_available():
    torch.cuda.is_bf16_supported = lambda *_, **__: False
with contextlib.redirect_stdout(io.StringIO()):
    from schedulefree import ScheduleFreeWrapper
    from sparsify.config import SparseCoderConfig, TrainConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

FAMILIES = ("topk",)


def train(family: str, rate: float | None, rows: Rows, size: dict, seed: int, folder: Path) -> tuple[Coder, Coder, str]:
    """Train and return (deployed, trained, settings). `rate` None: its defaults, signum without a schedule."""
    torch.manual_seed(seed)
    cfg = SparseCoderConfig(num_latents=size["n_latents"], k=size["k"])
    sae, n_steps = SparseCoder(size["d"], cfg, device="cpu", dtype=torch.float32), len(rows)
    optimizer, schedule, settings = make_optimizer(sae, rate, n_steps)
    for step, x in enumerate(rows):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
    sae.save_to_disk(folder)
    coder = coder_of_sparse(SparseCoder.load_from_disk(folder))
    return coder, coder, settings


def make_optimizer(sae: SparseCoder, rate: float | None, n_steps: int) -> tuple:
    """Return (optimizer, schedule, settings); TrainConfig's rules for both optimizers."""
    if rate is None:
        rate = 5e-3 / (sae.num_latents / 2**14) ** 0.5
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=rate), momentum=0.95)
        optimizer.train()
        return optimizer, None, f"{TrainConfig(sae.cfg).optimizer}, schedule-free, lr {rate:.2g}"
    adam = torch.optim.Adam(sae.parameters(), lr=rate)
    warmup = n_steps // 20
    return adam, get_linear_schedule_with_warmup(adam, warmup, n_steps), "Adam, its linear decay over the whole run"


def coder_of_sparse(sae: SparseCoder) -> Coder:
    def encode(x: Tensor) -> Tensor:
        acts, latents, _ = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter_(1, latents, acts)

    def decode(code: Tensor) -> Tensor:
        acts, latents = code.topk(sae.cfg.k, sorted=False)
        return sae.decode(acts, latents)

    return coder_of(encode, decode)
