"""Write the rows of a run with the project: what training sees, in its order, and held-out text. Project's environment.

rows/train.npy (n, d)         the batches of `python -m sae_lab.train seed=SEED`, one after the other
rows/held_out.npy (m, d)      activations of held-out text
rows/tokens.npy (r, t)        its tokens, m = r · t
"""

import argparse
from pathlib import Path

import hydra
import numpy as np
from numpy.lib.format import open_memmap

from sae_lab.activations.building import build_data
from sae_lab.activations.stream import StreamData
from sae_lab.cli.help import CONF


def data_of(overrides: list[str]) -> StreamData:
    """Return the data of the config of `python -m sae_lab.train` with these overrides."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return build_data(hydra.compose("train", overrides=["run_dir=unused", *overrides]))


def write_training_rows(data: StreamData, file: Path) -> None:
    """Write the rows to a file that appears whole or not at all."""
    partial = file.with_suffix(".partial")
    rows = open_memmap(partial, "w+", "float32", (data.n_tokens, data.n_sources * data.d_in))
    start = 0
    for batch in data.train_dataloader():
        rows[start : start + len(batch)] = batch.flatten(1).float().cpu().numpy()
        start += len(batch)
    assert start == data.n_tokens, f"the text ended after {start} of {data.n_tokens} rows"
    rows.flush()
    partial.rename(file)


def write_held_out(data: StreamData, n_tokens: int, folder: Path) -> None:
    tokens = data.held_out_rows(n_tokens)
    np.save(folder / "tokens.npy", tokens.cpu().numpy())
    np.save(folder / "held_out.npy", data.lm.activations(tokens).flatten(0, 1).flatten(1).float().cpu().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--held-out", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data = data_of(args.overrides)
    assert data.n_sources == 1, (
        f"other libraries' SAEs read one site, not {', '.join(data.sites)}: give one in lm.sites"
    )
    write_held_out(data, args.held_out, args.folder)
    write_training_rows(data, args.folder / "train.npy")


if __name__ == "__main__":
    main()
