"""Exports an SAE slice by slice of its latents, so that it need not fit the memory."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from sae_lab.interop.safetensors_file import SafetensorsFile
from sae_lab.runtime.files import atomic_file
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder
from sae_lab.saes.weights import with_latents

Read: TypeAlias = Callable[[range], BaseSAE]
"""Reads a slice of an SAE."""

SLICE = 2**26
"""Bytes of a slice's weights."""


def slices_of_folder(folder: Path) -> tuple[BaseSAE, Read]:
    """Return the first slice of an SAE folder of ours, and what reads the others."""
    one = load_sae_folder(folder, latents=range(1))
    size = sum(one.state_dict()[name].nbytes for name in one.latent_axes())

    def read(latents: range) -> BaseSAE:
        return load_sae_folder(folder, latents=latents)

    return read(range(min(one.n_latents, max(1, SLICE // size)))), read


def others(first: range, n: int) -> Iterator[range]:
    """Yield the slices after the first one, as large as it, up to n."""
    for start in range(first.stop, n, len(first)):
        yield range(start, min(start + len(first), n))


def write_slices(
    file: Path,
    convert: Callable[[BaseSAE], dict[str, Tensor]],
    axes: Mapping[str, int],
    sae: BaseSAE,
    read: Read | None,
) -> None:
    """Write a safetensors file of what `convert` makes of an SAE, one slice at a time.

    Args:
        convert: maps an SAE, or a slice of it, to the tensors of the file.
        axes: the axis of latents of those tensors that have one. The others are taken from the first slice.
        sae: the first slice; the whole SAE if `read` is None.
        read: reads another slice.
    """
    tensors = convert(sae)  # before anything is written, because it may raise
    whole = {name: (t.dtype, with_latents(t.shape, axes.get(name), sae.n_latents)) for name, t in tensors.items()}
    with atomic_file(file) as f:
        content = SafetensorsFile(f, whole)
        for name, tensor in tensors.items():
            content.put(name, tensor, axes.get(name, 0))
        for slice_of_sae in map(read, others(sae.own_latents, sae.n_latents)) if read else ():
            own, tensors = slice_of_sae.own_latents, convert(slice_of_sae)
            for name in axes.keys() & tensors.keys():
                content.put(name, tensors[name], axes[name], own.start)
