"""Train the bundled GPT-2 language model on Python's standard library: `python -m sae_lab.lm.tiny.train`."""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.text.bundled import StdlibDocuments
from sae_lab.text.documents import HELD_OUT, TRAIN, Documents
from sae_lab.text.encoding import Encoder
from sae_lab.text.rows import TextRows

BOS = "<|endoftext|>"
CONFIG: dict[str, Any] = {"vocab_size": 4096, "n_positions": 256, "n_embd": 128, "n_layer": 6, "n_head": 4}
SITE = "transformer.h.2"  # the default site of lm=tiny: the residual stream in the middle of the model
SEQ_LEN, BATCH_ROWS, LR, SEED = 128, 32, 3e-3, 0


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the training modules and save it; BOS has id 0."""
    documents = StdlibDocuments(TRAIN)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((documents[i] for i in range(len(documents))), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, unk_token=BOS)
    tokenizer.save_pretrained(folder)


def all_rows(tokenizer, documents: Documents) -> torch.Tensor:
    """Return all rows of one pass over the documents: token ids, (n, SEQ_LEN)."""
    rows = TextRows(documents, Encoder(tokenizer), SEQ_LEN, tokenizer.bos_token_id, repeat=False)
    return torch.tensor(list(rows))


@torch.no_grad()
def held_out_loss(lm: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    """Return the mean next-token cross-entropy in nats."""
    lm.eval()
    total = 0.0
    for chunk in rows.split(128):
        logits = lm(chunk).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (SEQ_LEN - 1))


def train_lm(lm: GPT2LMHeadModel, rows: torch.Tensor, n_steps: int, lr: float = LR) -> None:
    """Train with AdamW, 3 % warm-up, cosine decay to zero and bf16 autocast; rows are shuffled every pass."""
    decay = [p for p in lm.parameters() if p.ndim == 2]
    rest = [p for p in lm.parameters() if p.ndim != 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, int(0.03 * n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / n_steps)))
    )
    generator, start = torch.Generator().manual_seed(SEED), time.perf_counter()
    order: list[int] = []
    lm.train()
    for step in range(n_steps):
        if len(order) < BATCH_ROWS:
            order = torch.randperm(len(rows), generator=generator).tolist()
        batch, order = rows[order[:BATCH_ROWS]], order[BATCH_ROWS:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = lm(batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == n_steps - 1:
            rate = (step + 1) * BATCH_ROWS * SEQ_LEN / (time.perf_counter() - start)
            left = (n_steps - step - 1) * BATCH_ROWS * SEQ_LEN / rate / 60
            print(
                f"step {step:5d} / {n_steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s  {left:.1f} min left",
                flush=True,
            )


def zero_ablate_site(lm: GPT2LMHeadModel):
    """Register a hook that sets the default site to zero; return its handle."""
    return lm.get_submodule(SITE).register_forward_hook(
        lambda _m, _i, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
    )


def measure_lm(lm: GPT2LMHeadModel, rows: torch.Tensor, n_steps: int) -> dict:
    """Return the numbers of the model card, measured on the held-out modules."""
    p = torch.bincount(rows[:, 1:].flatten(), minlength=CONFIG["vocab_size"]).double()
    p = p[p > 0] / p.sum()
    clean = held_out_loss(lm, rows)
    handle = zero_ablate_site(lm)
    ablated = held_out_loss(lm, rows)
    handle.remove()
    entropy = -(p * p.log()).sum().item()
    return {
        "held_out_tokens": rows.numel(),
        "unigram_entropy": round(entropy, 4),
        "held_out_ce": round(clean, 4),
        "ce_over_unigram_entropy": round(clean / entropy, 4),
        f"held_out_ce_with_{SITE}_zeroed": round(ablated, 4),
        "training_steps": n_steps,
        "training_tokens": n_steps * BATCH_ROWS * SEQ_LEN,
        "parameters": sum(p.numel() for p in lm.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps of 4,096 tokens")
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    torch.manual_seed(SEED)
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**CONFIG, **no_dropout, bos_token_id=0, eos_token_id=0, use_cache=False)
    # Eager attention: at this size the fused CPU kernel's backward pass takes 40 % of a step.
    lm = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    train_lm(lm, all_rows(tokenizer, StdlibDocuments(TRAIN)), args.steps)
    lm.save_pretrained(args.out)
    card = measure_lm(lm, all_rows(tokenizer, StdlibDocuments(HELD_OUT)), args.steps)
    (args.out / "figures.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
