"""Writes a safetensors file piece by piece. The functions of safetensors need all tensors in memory at once."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""What the format calls them, in the order in which it stores them: the widest first, so that all are aligned."""


class SafetensorsFile:
    """A safetensors file whose tensors are known by dtype and shape, and written in any order.

    The bytes are those that `safetensors.torch.save` returns: the length of the header (8 bytes), the header (JSON,
    padded with spaces to a multiple of 8 bytes), and the tensors by width and name.

    Args:
        file: an empty file.
        tensors: dtype and shape of each tensor.
    """

    def __init__(self, file: BinaryIO, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]):
        self.file, self.tensors = file, tensors
        order, end = list(DTYPES), 0
        header: dict[str, dict[str, Any]] = {}
        for name in sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name)):
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        file.write(len(content).to_bytes(8, "little") + content)
        self.starts = {name: 8 + len(content) + header[name]["data_offsets"][0] for name in tensors}

    def put(self, name: str, tensor: Tensor, axis: int = 0, start: int = 0) -> None:
        """Write a tensor, or a part of it that begins at `start` along `axis`."""
        shape = self.tensors[name][1]
        width = math.prod(shape[axis + 1 :]) * tensor.element_size()
        for i, outer in enumerate(product(*(range(n) for n in shape[:axis]))):
            self.file.seek(self.starts[name] + (i * (shape[axis] if shape else 1) + start) * width)
            self.file.write(tensor[outer].contiguous().flatten().view(torch.uint8).numpy().data)
