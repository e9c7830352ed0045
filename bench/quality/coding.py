"""What every system hands to the judge: x_hat of the held-out rows, and which latents are active. Plain torch.

A system is judged through its own functions, twice: under the rule with which it is deployed, row by row, and under
the rule with which it was trained, which may look at the whole batch.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Coder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps raw rows (b, d) to (x_hat, code), (b, d) in raw units and (b, f) dense."""


def coder_of(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> Coder:
    """Return the Coder of a library that has these two functions."""

    def autoencode(x: Tensor) -> tuple[Tensor, Tensor]:
        code = encode(x)
        return decode(code), code

    return autoencode


class Rows:
    """Batches of rows in a file, always in the same order. Every batch is a copy: a trainer may change it in place."""

    def __init__(self, file: Path, batch_size: int):
        self.rows, self.batch_size = np.load(file, mmap_mode="r"), batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), self.batch_size):
            yield torch.from_numpy(np.array(self.rows[start : start + self.batch_size]))


@torch.no_grad()
def write_codes(folder: Path, rule: str, coder: Coder, rows: Tensor, batch_size: int) -> None:
    """Write what `coder` makes of the rows, as `folder/<rule>.pt`.

    The rows are coded in batches of the training size in a shuffled order that is the same for every system, since
    batches of neighbouring rows would differ more from each other than those of training.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    x_hat, l0 = torch.empty_like(rows), torch.empty(len(rows))
    fires = torch.zeros((), dtype=torch.long)
    for batch in order.split(batch_size):
        x_hat[batch], code = coder(rows[batch])
        active = code != 0
        l0[batch] = active.sum(1).float()
        fires = fires + active.sum(0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"x_hat": x_hat, "l0": l0, "fires": fires}, folder / f"{rule}.pt")


def write_all(folder: Path, row: dict, deployed: Coder, trained: Coder, rows: Tensor, batch_size: int) -> None:
    """Write the codes under both rules; `row` says what was trained. It is written last: it marks a complete folder."""
    write_codes(folder, "deployed", deployed, rows, batch_size)
    write_codes(folder, "trained", trained, rows, batch_size)
    (folder / "row.json").write_text(json.dumps(row))
