"""Fine-tune the bundled model on Python bytecode, for model diffing: `python -m sae_lab.lm.tiny.fine_tune`."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from sae_lab.lm.finding import FINE_TUNED_TINY, TINY, find_folder
from sae_lab.lm.tiny.train import SEED, all_rows, held_out_loss, train_lm
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.text.bundled import DisassembledStdlib, StdlibDocuments
from sae_lab.text.documents import HELD_OUT, TRAIN

LR = 1e-3  # a third of the learning rate of the bundled model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(FINE_TUNED_TINY), help="folder to write")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 4,096 tokens")
    args = parser.parse_args()
    keep_freed_memory()
    folder = find_folder(TINY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    texts = {"source": StdlibDocuments, "disassembly": DisassembledStdlib}
    held_out = {name: all_rows(tokenizer, documents(HELD_OUT))[:256] for name, documents in texts.items()}
    card = {f"{name}_ce_before": held_out_loss(lm, rows) for name, rows in held_out.items()}
    torch.manual_seed(SEED)
    train_lm(lm, all_rows(tokenizer, DisassembledStdlib(TRAIN)), args.steps, LR)
    card |= {f"{name}_ce_after": held_out_loss(lm, rows) for name, rows in held_out.items()}
    lm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "figures.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
