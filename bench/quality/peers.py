"""Train other libraries' SAEs on the rows of rows.py and write the codes of the held-out rows. Peers' environment."""

import argparse
import importlib
import json
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from coding import Rows, write_all

SYSTEMS = {"SAELens": "sae_lens_peer", "dictionary_learning": "dictionary_learning_peer", "sparsify": "sparsify_peer"}


def size_of(d: int, f: int, k: int) -> dict:
    """Return what is equal for every system. Matryoshka's groups are the default ones of this project."""
    prefixes = [p for p in (f // 16, f // 8, f // 4, f // 2) if d <= p < f] + [f]
    widths = [b - a for a, b in zip([0, *prefixes], prefixes, strict=False)]
    fractions = [w / f for w in widths]
    return {"d": d, "n_latents": f, "k": k, "prefixes": prefixes, "group_fractions": fractions}


def train_one(system: str, family: str, rate: float | None, args: argparse.Namespace) -> None:
    name = f"{system}-{family}-{'default' if rate is None else f'{rate:g}'}-{args.seed}"
    folder = args.out / name
    if (folder / "row.json").is_file():
        return
    peer = importlib.import_module(SYSTEMS[system])
    if family not in peer.FAMILIES:
        return
    rows = Rows(args.rows / "train.npy", args.batch_size)
    held_out = torch.from_numpy(np.load(args.rows / "held_out.npy"))
    start = time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    deployed, trained, settings = peer.train(
        family, rate, rows, size_of(held_out.shape[1], args.n_latents, args.k), args.seed, folder
    )
    seconds = time.process_time() - start
    row = {"system": system, "family": family, "rate": "default" if rate is None else f"{rate:g}", "seed": args.seed}
    row |= {"settings": settings, "n_tokens": len(rows.rows), "cpu_seconds": round(seconds, 1)}
    write_all(folder, row, deployed, trained, held_out, args.batch_size)
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--families", nargs="+", required=True)
    parser.add_argument("--rates", nargs="+", required=True, help="default, or a learning rate")
    parser.add_argument("--n-latents", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    failed = 0
    for system in args.systems:
        for family in args.families:
            for rate in args.rates:
                try:
                    train_one(system, family, None if rate == "default" else float(rate), args)
                except Exception:  # one that cannot run must not stop the others; the table shows what is missing
                    failed += 1
                    traceback.print_exc()
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
