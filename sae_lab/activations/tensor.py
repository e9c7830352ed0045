"""`data=tensor`: batches of activations from files of anyone, without a language model."""

import logging
from collections.abc import Generator, Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.finite import LARGEST
from sae_lab.activations.held_out import HeldOut, HeldOutRows
from sae_lab.activations.pieces import PiecePasses
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Chunk, Source
from sae_lab.activations.stream import StreamData
from sae_lab.activations.tensor_files import Axes, TensorFiles, TensorRows, expanded, rows_in_memory
from sae_lab.lm.none import NoLM
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.device import send
from sae_lab.runtime.errors import SettingError, UserError

log = logging.getLogger(__name__)

PIECE = 128
"""Rows that are read together; fewer where there would be less than TENTHS · held_out_every pieces."""
TENTHS = 10
CHUNK_BYTES = 2**24
"""Size of a chunk of pieces. It changes no row."""


class Pieces:
    """The pieces of consecutive rows into which the rows of files are cut, and which of them are held out.

    Args:
        n_rows: rows in all.
        held_out_every: the last of so many pieces is held out.

    Raises:
        SettingError: there are fewer than `held_out_every` rows.
    """

    def __init__(self, n_rows: int, held_out_every: int):
        if n_rows < held_out_every:
            raise SettingError(
                f"{{path}} holds {n_rows:,} rows, too few to hold out one in {{held_out_every}}={held_out_every}: give "
                "more rows, or lower {held_out_every}."
            )
        self.n_rows, self.every = n_rows, held_out_every
        self.size = min(PIECE, max(1, n_rows // (TENTHS * held_out_every)))
        self.n = -(-n_rows // self.size)

    def rows_of(self, i: int) -> range:
        return range(i * self.size, min((i + 1) * self.size, self.n_rows))

    @property
    def train(self) -> Tensor:
        numbers = torch.arange(self.n)
        return numbers[numbers % self.every != self.every - 1]

    @property
    def held_out(self) -> list[int]:
        """The held-out pieces in an order that is always the same, so that the first ones come from all over."""
        numbers = torch.arange(self.every - 1, self.n, self.every)
        return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))].tolist()

    def first_held_out(self, n_rows: int) -> list[range]:
        """Return so many rows of the held-out pieces, or all of them: the last piece is cut."""
        found, left = list[range](), n_rows
        for i in self.held_out:
            if left <= 0:
                break
            found.append(self.rows_of(i)[:left])
            left -= len(found[-1])
        return found


class TensorSource:
    """A Source that yields every training row once per pass, in the order of PiecePasses.

    Each of n ranks reads the rows of every n-th chunk.
    """

    def __init__(self, data: "TensorData"):
        self.data = data
        at_once = CHUNK_BYTES // (data.pieces.size * data.bytes_per_token)
        self.passes = PiecePasses(data.pieces.train, at_once, data.seed, data.repeat)

    def state_dict(self) -> dict[str, Any]:
        return self.passes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        for i, (state, pieces) in enumerate(self.passes):
            if i % world_size() == rank():
                rows = self.data.read(pieces.tolist())
            else:
                shape = (len(pieces) * self.data.pieces.size, self.data.n_sources, self.data.d_in)
                rows = torch.empty(shape, dtype=self.data.dtype, device="meta")
            yield Chunk(state, rows, rank=i % world_size())


class TensorData(StreamData):
    """Batches `(b, s, d)` of activations in files: `.pt`, `.safetensors`, `.npy`, or a folder of them.

    Rows keep the dtype of the files, but float64 becomes float32. Rows of `n_tokens`, `n_eval_tokens` and
    `n_val_tokens` are counted as tokens are.

    Args:
        lm: says on which device the activations are used.
        path, key, axes: where the activations are; see TensorFiles.
        tensor: the activations themselves, where `path` is None.
        held_out_every: one piece of at most PIECE consecutive rows in so many is held out.
        stream: the other arguments of StreamData.

    Raises:
        SettingError: the files hold no activations, or fewer than one batch can be made of.
        UserError: an activation is not finite (raised when it is read).
    """

    @check_arguments
    def __init__(
        self,
        lm: NoLM,
        path: str | None,
        *,
        key: str | None,
        axes: Axes,
        held_out_every: Annotated[int, Ge(2)],
        tensor: Tensor | None = None,
        **stream: Any,
    ):
        super().__init__(lm.device, **stream)
        self.files = open_rows(path, key, axes, tensor)
        self.pieces = Pieces(len(self.files), held_out_every)
        file = self.files.parts[0].file
        self.name = path or str(file)
        stem = file.stem if file == expanded(self.name) else expanded(self.name).name
        s = self.files.n_sources
        self.d_in, self.dtype = self.files.d, self.files.dtype
        self.sites = (stem,) if s == 1 else tuple(f"{stem}.{i}" for i in range(s))
        log.info("%s", self.describe())
        if axes in ("auto", "nd") and len(self.files) < 2 * self.d_in:
            log.warning("%s", self.warn_of_width())
        self.begin()

    def describe(self) -> str:
        """Return one line about what is read."""
        n, n_held_out = len(self.files), sum(len(self.pieces.rows_of(i)) for i in self.pieces.held_out)
        shape = f"{n:,} rows of {self.n_sources} × {self.d_in} (sources × width)"
        of, here = ", ".join(self.files.found), str(self.dtype).removeprefix("torch.")
        dtype = of if of == here else f"{of}, converted to {here}"
        passes = self.n_tokens / (n - n_held_out)
        times = f"{n_held_out:,} are held out, and n_tokens are {passes:.3g} passes over the others"
        return f"{self.name}: {shape}, {dtype}; {times}."

    def warn_of_width(self) -> str:
        """Return the sentence about rows that are few for their width, as those of a transposed tensor are."""
        return (
            f"{self.name} has {len(self.files):,} rows of width {self.d_in:,}, fewer than twice the width: if the axes "
            "are the wrong way round, save x.T instead of x; otherwise give more rows."
        )

    def read(self, pieces: Sequence[int]) -> Float[Tensor, "n s d"]:
        """Return the rows of some pieces, on the device.

        Raises:
            UserError: a row is not finite, or above LARGEST; it names the file and the row.
        """
        return self._read_ranges([self.pieces.rows_of(i) for i in pieces])

    def _read_ranges(self, ranges: Sequence[range]) -> Float[Tensor, "n s d"]:
        rows = self.files.rows(ranges)
        low, high = torch.stack(torch.aminmax(rows)).tolist()  # NaN if any number is
        if not -LARGEST < low <= high < LARGEST:
            raise UserError(self._describe_bad_row(rows, [row for r in ranges for row in r]))
        return send(rows, self.device)

    def _describe_bad_row(self, rows: Float[Tensor, "n s d"], numbers: Sequence[int]) -> str:
        bad = ~(rows.abs() < LARGEST)
        first = int(bad.flatten(1).any(dim=1).nonzero()[0])
        part, row = self.files.locate(numbers[first])
        return (
            f"{part.file} has {rows[first][bad[first]][0].item():.3g} in row {row:,} (counted from 0): "
            "leave such rows out, x[x.isfinite().all(-1)], and save the others."
        )

    def source(self) -> Source:
        return TensorSource(self)

    def read_ahead(self, source: Source) -> PrefetchedSource:
        return PrefetchedSource(source, 0, self.device)

    def held_out(self, n_tokens: int) -> HeldOut:
        at_once = max(1, self.batch_size // self.pieces.size)
        taken = self.pieces.first_held_out(n_tokens)
        n_rows = sum(map(len, taken))
        parts = [taken[i : i + at_once] for i in range(0, len(taken), at_once)]
        return HeldOut(parts, n_rows, n_rows < n_tokens, self._read_part)

    def _read_part(self, part: Sequence[range]) -> HeldOutRows:
        x = self._read_ranges(part)
        return HeldOutRows(x, [len(x)], torch.zeros(len(x), dtype=torch.bool))

    def probe_rows(self, n: int = 16) -> Float[Tensor, "n s d"]:
        x = self.read(self.pieces.held_out[: -(-n // self.pieces.size)])
        return x[:: max(1, len(x) // n)][:n]

    @cached_property
    def source_digests(self) -> dict[str, str]:
        return {"the activations": self.files.digest()}

    def origin(self) -> dict[str, Any]:
        return {"model": {"name": None, "revision": None}, "sites": list(self.sites), "tokenizer": None, "bos": None}


def open_rows(path: str | None, key: str | None, axes: Axes, tensor: Tensor | None) -> TensorRows:
    """Return the rows of files, or of a tensor in memory.

    Raises:
        SettingError: there is neither.
    """
    if path is not None:
        return TensorFiles(path, key, axes)
    if tensor is None:
        raise SettingError(
            "the activations of this run were a tensor in memory ({path}=null): save it with torch.save(x, 'acts.pt') "
            "and give {path}=acts.pt."
        )
    return rows_in_memory(tensor, axes)
