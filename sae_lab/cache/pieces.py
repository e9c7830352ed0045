"""What stands in a shard file: the rows of each site in pieces, each with a checksum.

    activations.0   (n, d) rows of site 0 in the stored dtype; with compression: the frames of its pieces, as uint8
    scales.0        (n) float32, for dtypes with a scale per row
    offsets.0       (p + 1) int64, with compression: where each frame begins, and the end
    checksums       (p, s) int64, of each piece of each site: its stored bytes, then those of its scales
    shape           n, s, d
    tokens          (r, t) of the text rows

and so on for the other sites. A piece is PIECE rows (the last one may be shorter). A piece of a site is the unit that
is read, verified and compressed, so a run reads the bytes of its sites only. Shards of format 2 hold
`activations (n, s, d)` and checksums (p) instead, and are read as well.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.digests import as_bytes
from sae_lab.cache.codec import Codec, compress, decompress

PIECE = 128


def pack(sites: Iterable[Float[Tensor, "n d"]], tokens: Int[Tensor, "r t"], codec: Codec) -> dict[str, Tensor]:
    """Return the tensors of a shard from the rows of each site. The rows of one site at a time are held in memory."""
    quantized = [codec.quantize(x) for x in sites]
    n, d = quantized[0][0].shape
    tensors, checksums = {"tokens": tokens.int(), "shape": torch.tensor([n, len(quantized), d])}, []
    for j, (q, scales) in enumerate(quantized):
        parts = [as_bytes(piece) for piece in q.split(PIECE)]
        if codec.compression == "zstd":
            frames = [compress(piece) for piece in q.split(PIECE)]
            ends = torch.tensor([0, *map(len, frames)]).cumsum(0)
            parts, tensors[f"offsets.{j}"] = [memoryview(frame) for frame in frames], ends
            q = torch.frombuffer(bytearray().join(frames), dtype=torch.uint8)
        tensors[f"activations.{j}"] = q
        if scales is not None:
            tensors[f"scales.{j}"] = scales
        checksums.append([checksum(part, piece_of(scales, i)) for i, part in enumerate(parts)])
    bits = np.array(checksums, dtype=np.uint64).view(np.int64)
    return tensors | {"checksums": torch.from_numpy(bits).T.contiguous()}


def piece_of(x: Tensor | None, i: int) -> Tensor | None:
    return None if x is None else x[i * PIECE : (i + 1) * PIECE]


def checksum(stored: memoryview, scales: Tensor | None) -> int:
    """Return the xxh3-64 digest of a piece of a site."""
    if scales is None:
        return xxhash.xxh3_64_intdigest(stored)
    digest = xxhash.xxh3_64(stored)
    digest.update(as_bytes(scales))
    return digest.intdigest()


def checksum_of_index(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of what tells the rows of a shard from those of another, without reading the rows.

    That is the tokens, the checksums of the pieces, where they are, and the dtype and shape of everything.
    """
    if "activations" in tensors:
        rows, names = tensors["activations"], ["tokens", "checksums"]
        digest = xxhash.xxh3_128(f"{rows.dtype} {tuple(rows.shape)} {tuple(tensors['tokens'].shape)}".encode())
    else:
        digest = xxhash.xxh3_128(repr([(n, str(t.dtype), tuple(t.shape)) for n, t in sorted(tensors.items())]).encode())
        names = [name for name in sorted(tensors) if not name.startswith(("activations", "scales"))]
    for name in names:
        digest.update(as_bytes(tensors[name]))
    return digest.hexdigest()


class WholePieces:
    """The rows of a shard of format 2, with a checksum for all sites of a piece.

    Raises:
        ValueError, KeyError: the tensors are not those of a shard.
    """

    def __init__(self, tensors: Mapping[str, Tensor], codec: Codec):
        self.activations, checksums = tensors["activations"], tensors["checksums"]
        n, s, d = self.shape = tuple(self.activations.shape)
        check_tensor(self.activations, codec.stored, (n, s, d))
        check_tensor(checksums, torch.int64, (-(-n // PIECE),))
        self.checksums = checksums.numpy().view(np.uint64)

    def read(self, i: int, sites: Sequence[int], out: Float[Tensor, "n s d"]) -> None:
        """Write the rows of piece i into `out`; raise a ValueError if they are damaged."""
        rows = self.activations[i * PIECE : (i + 1) * PIECE]
        if checksum(as_bytes(rows), None) != self.checksums[i]:
            raise ValueError("checksum")
        for k, site in enumerate(sites):
            out[:, k] = rows[:, site]


class SitePieces:
    """The rows of a shard, site by site.

    Raises:
        ValueError, KeyError: the tensors are not those of a shard.
    """

    def __init__(self, tensors: Mapping[str, Tensor], codec: Codec):
        self.codec, self.tensors = codec, tensors
        check_tensor(tensors["shape"], torch.int64, (3,))
        n, s, d = self.shape = tuple(tensors["shape"].tolist())
        pieces = -(-n // PIECE)
        check_tensor(tensors["checksums"], torch.int64, (pieces, s))
        self.checksums = tensors["checksums"].numpy().view(np.uint64)
        for j in range(s):
            if codec.has_scales:
                check_tensor(tensors[f"scales.{j}"], torch.float32, (n,))
            if codec.compression == "none":
                check_tensor(tensors[f"activations.{j}"], codec.stored, (n, d))
            else:
                check_offsets(tensors[f"offsets.{j}"], pieces, tensors[f"activations.{j}"])

    def read(self, i: int, sites: Sequence[int], out: Float[Tensor, "n s d"]) -> None:
        """Write the rows of piece i at these sites into `out`; raise a ValueError if they are damaged."""
        for k, site in enumerate(sites):
            scales = piece_of(self.tensors.get(f"scales.{site}"), i)
            stored = self._stored(i, site)
            if checksum(as_bytes(stored), scales) != self.checksums[i, site]:
                raise ValueError("checksum")
            if self.codec.compression == "zstd":
                like = torch.empty(len(out), self.shape[2], dtype=self.codec.stored, device="meta")
                stored = decompress(as_bytes(stored), like)
            self.codec.dequantize(stored, scales, out[:, k])

    def _stored(self, i: int, site: int) -> Tensor:
        """Return the part of the site's tensor that holds piece i."""
        tensor = self.tensors[f"activations.{site}"]
        if self.codec.compression == "none":
            return tensor[i * PIECE : (i + 1) * PIECE]
        begin, end = self.tensors[f"offsets.{site}"][i : i + 2].tolist()
        return tensor[begin:end]


def check_tensor(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if a tensor has another dtype or shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"a tensor of {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")


def check_offsets(offsets: Int[Tensor, " p"], pieces: int, frames: Tensor) -> None:
    """Raise a ValueError unless the offsets cut the whole of `frames` into that many parts, in order."""
    check_tensor(offsets, torch.int64, (pieces + 1,))
    check_tensor(frames, torch.uint8, (frames.numel(),))
    if offsets[0] != 0 or offsets[-1] != len(frames) or (offsets.diff() <= 0).any():
        raise ValueError("offsets")
