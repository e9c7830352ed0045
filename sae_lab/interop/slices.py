"""Exports an SAE slice by slice of its latents, so that it need not fit the memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from sae_lab.interop.safetensors_file import SafetensorsFile
from sae_lab.runtime.files import atomic_file
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import check_sae_files, load_sae_folder, sae_folder
from sae_lab.saes.weights import pieces, with_latents

Read: TypeAlias = Callable[[range], BaseSAE]
"""Reads a slice of an SAE."""

SLICE = 2**24
"""Bytes of a slice's weights."""


def slices_of_folder(folder: Path) -> tuple[BaseSAE, Read]:
    """Check an SAE folder of ours, and return its first slice and what reads the others."""
    check_sae_files(sae_folder(folder))
    one = load_sae_folder(folder, latents=range(1), checked=True)
    size = sum(one.state_dict()[name].nbytes for name in one.latent_axes())

    def read(latents: range) -> BaseSAE:
        return load_sae_folder(folder, latents=latents, checked=True)

    return read(range(min(one.n_latents, max(1, SLICE // size)))), read


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
        first = sae.own_latents
        for own in pieces(range(first.stop, sae.n_latents), len(first)) if read else ():
            tensors = convert(read(own))  # type: ignore[misc]
            for name in axes.keys() & tensors.keys():
                content.put(name, tensors[name], axes[name], own.start)
