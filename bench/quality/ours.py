"""Write the codes that this project's runs give to the held-out rows. Project's environment."""

import argparse
from pathlib import Path

import numpy as np
import torch
from coding import Coder, write_all
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lab import load_sae
from sae_lab.saes.base import BaseSAE


def coder_in(sae: BaseSAE, training: bool) -> Coder:
    """Return the Coder of an SAE in one of its modes; only `forward` in train mode would change its state."""

    def autoencode(x: Tensor) -> tuple[Tensor, Tensor]:
        sae.train(training)
        x_hat, code = sae.autoencode(x.unsqueeze(1))
        return x_hat.flatten(1), code if isinstance(code, Tensor) else code.to_dense()

    return autoencode


def row_of(cfg: DictConfig, rate: str) -> dict:
    """Return what the table says of a run."""
    family = cfg.sae._target_.split(".")[-2]
    settings = f"normalize={cfg.sae.normalize}"
    row = {"system": "SAE Lab", "family": family, "rate": rate, "seed": cfg.seed, "settings": settings}
    return row | {"n_tokens": cfg.n_tokens, "cpu_seconds": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="a sweep folder of `python -m sae_lab.train -m`")
    parser.add_argument("--rate", required=True, help="what the table calls the learning rate")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    held_out = torch.from_numpy(np.load(args.rows / "held_out.npy"))
    for config in sorted(args.runs.glob("*/.hydra/config.yaml")):
        cfg, folder = OmegaConf.load(config), config.parent.parent
        row, sae = row_of(cfg, args.rate), load_sae(folder)
        name = "-".join(str(row[key]) for key in ("system", "family", "settings", "rate", "seed")).replace(" ", "_")
        write_all(args.out / name, row, coder_in(sae, False), coder_in(sae, True), held_out, cfg.batch_size)


if __name__ == "__main__":
    main()
