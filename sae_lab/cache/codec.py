"""How the rows of one site are stored: as which numbers, with which scales, compressed or not."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import zstandard
from jaxtyping import Float
from torch import Tensor

from sae_lab.activations.digests import as_bytes

CacheDtype = Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3", "auto"]
Compression = Literal["none", "zstd"]

STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}
LARGEST_STORED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of a dtype whose rows have a scale."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
AT_A_TIME = 1024
"""Rows that are divided by their scales at a time, so that float32 copies of a whole shard need no memory."""
LEVEL = 1
"""zstd's level. On bfloat16 activations of the bundled model, level 1 leaves 0.787 of the bytes and packs 0.9 GB/s on
one core (AMD EPYC); level 9 leaves 0.787 at 0.3 GB/s. Bytes sorted into planes first (all high bytes, then all low
bytes) leave 0.785 at level 1 and 0.753 at level 9 with 0.1 GB/s, so they are not sorted."""


class Codec(NamedTuple):
    """What is stored for a row x of one site.

    A float dtype stores x rounded to it. `int8` and `float8_e4m3` store a float32 scale per row (absmax, symmetric):

        scale = max_i |x_i| / largest        largest = 127 for int8, 448 for float8_e4m3
        q = round(x / scale)                 x ≈ q · scale

    The error per element is at most scale / 2 for int8, and |x| / 16 for float8_e4m3 above scale / 64. The latter needs
    the scale for its range: larger activations than 448 do occur, and it has no infinity.

    Args:
        dtype: a key of STORED.
        decoded: dtype of the rows that are read; the language model's for int8 and float8_e4m3, `dtype` otherwise.
        compression: `zstd` compresses each piece of each site by itself, without loss.
    """

    dtype: str
    decoded: torch.dtype
    compression: str = "none"

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> "Codec":
        """Return the codec that a cache's key describes; raise a ValueError if there is no such one."""
        dtype, compression = key["dtype"], key.get("compression", "none")
        if dtype not in STORED or compression not in ("none", "zstd"):
            raise ValueError(f"dtype {dtype}, compression {compression}")
        scaled = STORED[dtype] in LARGEST_STORED
        decoded = getattr(torch, key["lm.dtype"]) if scaled else STORED[dtype]
        if not (isinstance(decoded, torch.dtype) and decoded.is_floating_point):
            raise ValueError(f"lm.dtype {key['lm.dtype']}")
        return cls(dtype, decoded, compression)

    @property
    def stored(self) -> torch.dtype:
        return STORED[self.dtype]

    @property
    def has_to_decode(self) -> bool:
        """Whether reading is more than copying."""
        return self.has_scales or self.compression != "none"

    @property
    def has_scales(self) -> bool:
        return self.stored in LARGEST_STORED

    def bytes_per_row(self, d: int) -> int:
        """Return the bytes of a row of one site before compression."""
        return d * self.stored.itemsize + 4 * self.has_scales

    def quantize(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Float[Tensor, " n"] | None]:
        """Return q in the stored dtype, and the scales, if it has any."""
        if not self.has_scales:
            return x.to(self.stored).contiguous(), None
        q, scales = torch.empty(x.shape, dtype=self.stored), torch.empty(len(x))
        for part, out, scale in zip(*(y.split(AT_A_TIME) for y in (x, q, scales)), strict=True):
            self._quantize_part(part.float(), out, scale)
        return q, scales

    def _quantize_part(self, x: Float[Tensor, "n d"], out: Tensor, scale: Float[Tensor, " n"]) -> None:
        largest = LARGEST_STORED[self.stored]
        scale.copy_((x.abs().amax(dim=1) / largest).clamp_min_(SMALLEST_SCALE))
        q = (x / scale[:, None]).clamp_(-largest, largest)
        out.copy_(q.round_() if self.stored == torch.int8 else q)

    def dequantize(self, q: Tensor, scales: Float[Tensor, " n"] | None, out: Float[Tensor, "n d"]) -> None:
        """Write the rows into `out`, whose dtype is `decoded`."""
        if scales is None:
            out.copy_(q)
            return
        if q.dtype == torch.float8_e4m3fn:
            q, scales = as_half(q), scales * 256
        x = q.to(torch.float32).mul_(scales[:, None])
        out.copy_(x)

    def round_trip(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the rows that a cache would give for x."""
        out = torch.empty(x.shape, dtype=self.decoded)
        self.dequantize(*self.quantize(x), out)
        return out


def as_half(q: Tensor) -> Tensor:
    """Return float8_e4m3fn numbers / 256, exactly, as float16: the same bits with another bias of the exponent.

    torch's own conversion took seven times as long on one core. NaN, which no cache holds, becomes 480 / 256.
    """
    bits = q.view(torch.int8).to(torch.int16)  # the sign goes to the top
    return ((bits << 7) & ~0x4000).view(torch.float16)


def compress(q: Tensor) -> bytes:
    """Compress the memory of a tensor to one frame, which declares its size."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(as_bytes(q))


def decompress(frame: memoryview, like: Tensor) -> Tensor:
    """Return the tensor that `compress` was given; `like` has its dtype and shape, and no memory need be behind it.

    Raises:
        ValueError: the frame is damaged, or holds another number of bytes. Nothing larger is allocated.
    """
    n_bytes = like.numel() * like.element_size()
    try:
        if zstandard.frame_content_size(frame) != n_bytes:
            raise ValueError("a frame declares another size than that of its piece")
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=n_bytes, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise ValueError("a frame is damaged") from e
    return torch.frombuffer(bytearray(content), dtype=like.dtype).view(like.shape)


def storage_errors(codec: Codec, rows: Float[Tensor, "n s d"], sites: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return by site what storing costs on these rows, q(x) being what a cache gives for x.

        relative = ‖x − q(x)‖ / ‖x‖          fvu = ‖x − q(x)‖² / ‖x − mean(x)‖²        (sums over rows)

    `fvu` is the least that an SAE can reach if it reconstructs q(x) without error and is judged against x.
    """
    found = {}
    for name, x in zip(sites, rows.cpu().unbind(dim=1), strict=True):
        exact = x.double()
        error = (exact - codec.round_trip(x).double()).square().sum()
        spread = (exact - exact.mean(dim=0)).square().sum()
        relative = (error / exact.square().sum()).sqrt()
        found[name] = {"relative": ratio(relative), "fvu": ratio(error / spread)}
    return found


def ratio(x: Tensor) -> float:
    """Return a ratio as a number; 0 for 0 / 0."""
    return torch.nan_to_num(x, nan=0.0, posinf=torch.finfo(torch.float64).max).item()
