"""Judge the codes that every system wrote: one definition for all, in plain torch. Project's environment.

    fvu              sum (x - x_hat)² / sum (x - mean x)², the mean per dimension over the held-out rows
    l0               mean number of non-zero latents of a row
    dead             share of the latents that no held-out row activates
    ce_degradation   next-token cross-entropy with x_hat in place of x, less that without, in nats

`fvu`, `l0`, `dead` and `ce_degradation` are of the deployed rule; `fvu_trained` and `l0_trained` of the training rule.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from rows import data_of
from torch import Tensor
from torch.nn.functional import cross_entropy

TEXT_ROWS = 32
"""Rows of text in one pass over the language model."""


def fvu(x: Tensor, x_hat: Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


class Model:
    """The language model on the held-out tokens."""

    def __init__(self, overrides: list[str], tokens: Tensor):
        self.lm, self.tokens = data_of(overrides).lm, tokens
        self.clean = self.mean_ce(None)

    @torch.no_grad()
    def mean_ce(self, x_hat: Tensor | None) -> float:
        """Return the mean next-token cross-entropy with x_hat (n·t, d) in place of the activations."""
        n, t = self.tokens.shape
        replace = None if x_hat is None else x_hat.view(n, t, 1, -1)
        total = 0.0
        for i in range(0, n, TEXT_ROWS):
            tokens = self.tokens[i : i + TEXT_ROWS]
            logits = self.lm.logits(tokens, *(() if replace is None else (replace[i : i + TEXT_ROWS],)))
            total += float(
                cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
            )
        return total / (n * (t - 1))


def judge(folder: Path, x: Tensor, model: Model) -> dict:
    """Return one line of the table."""
    row = json.loads((folder / "row.json").read_text())
    deployed, trained = (torch.load(folder / f"{rule}.pt") for rule in ("deployed", "trained"))
    row["fvu"], row["l0"] = fvu(x, deployed["x_hat"]), float(deployed["l0"].mean())
    row["fvu_trained"], row["l0_trained"] = fvu(x, trained["x_hat"]), float(trained["l0"].mean())
    row["dead"] = float((deployed["fires"] == 0).float().mean())
    row["ce_degradation"] = model.mean_ce(deployed["x_hat"]) - model.clean
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    x = torch.from_numpy(np.load(args.rows / "held_out.npy"))
    model = Model(args.overrides, torch.from_numpy(np.load(args.rows / "tokens.npy")))
    rows = [judge(file.parent, x, model) for file in sorted(args.codes.glob("*/row.json"))]
    with args.csv.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5f}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
