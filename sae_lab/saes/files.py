"""Save and load SAE folders: config.json, the weights (see weights.py) and probe.safetensors."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from sae_lab.parallel.mesh import latent_axis, only_latents
from sae_lab.parallel.shards import gather_over_shards
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import (
    atomic_file,
    digest_of_file,
    digest_of_json,
    format_json,
    read_json,
    write_atomically,
    write_json,
)
from sae_lab.runtime.memory import check_memory
from sae_lab.runtime.seeds import nothing_drawn
from sae_lab.saes.base import BaseSAE, rename_old_tensors
from sae_lab.saes.probe import check_probe, make_probe
from sae_lab.saes.weights import (
    INDEX,
    WEIGHTS,
    Part,
    files_to_check,
    fill,
    index_of,
    key_of,
    read_parts,
    shape_of,
    shard_name,
    weight_files,
    whole_shapes,
)

log = logging.getLogger(__name__)

CONFIG, PROBE = "config.json", "probe.safetensors"
KEYS = {"class", "config", "provenance", "probe", "digests"}
"""Of config.json. Any other is damage: a flipped bit in the word `digests` must not switch the check off."""


def save_sae(
    sae: BaseSAE,
    folder: str | Path,
    provenance: dict[str, Any] | None = None,
    probe_rows: Float[Tensor, "n s d"] | None = None,
) -> Path:
    """Write an SAE folder: config.json (class, arguments, provenance) and the weights (parameters and buffers).

    The weights are sae.safetensors. If the latents are sharded, all ranks that hold a part of them call this, and each
    writes its own file (see weights.py).

    Args:
        sae: the SAE to save.
        folder: the folder to write into; created if needed.
        provenance: where the SAE comes from, written into config.json.
        probe_rows: raw activations. They are saved with the SAE's outputs in probe.safetensors, which loading checks.

    Raises:
        UserError: a parameter or a buffer is not finite, such as a threshold of infinity; nothing is written.
    """
    folder, own = Path(folder), sae.own_latents
    if latent_axis().size * len(own) != sae.n_latents:
        raise UserError(f"the SAE holds latents {own.start} to {own.stop - 1} of {sae.n_latents} only: save it whole.")
    description = {"class": type(sae).__name__, "config": sae.config, "provenance": provenance or {}}
    tensors = own_tensors(sae)
    if bad := sorted(set().union(*gather_over_shards(not_finite(tensors)))):
        raise UserError(f"{', '.join(bad)} of the {type(sae).__name__} not finite, so it is not saved: train it again.")
    probe = None if probe_rows is None else make_probe(sae, probe_rows)
    folder.mkdir(parents=True, exist_ok=True)
    digests = write_weights(sae, tensors, folder)
    if latent_axis().index:
        return folder
    if probe is not None:
        description["probe"] = PROBE
        digests[PROBE] = write_recorded(folder / PROBE, probe)
    for file in {WEIGHTS, INDEX, *(file.name for file in folder.glob("sae-*-of-*.safetensors"))} - digests.keys():
        (folder / file).unlink(missing_ok=True)  # of an SAE that was saved there before, on another number of ranks
    write_json(folder / CONFIG, description | {"digests": digests | {CONFIG: digest_of_description(description)}})
    return folder


def own_tensors(sae: BaseSAE) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: those of its latents, and on the first rank all others.

    Copied, because safetensors refuses two names for the same memory, which tied weights have.
    """
    axes = sae.latent_axes()
    return {
        name: t.cpu().clone(memory_format=torch.contiguous_format)
        for name, t in sae.state_dict().items()
        if name in axes or latent_axis().index == 0
    }


def write_weights(sae: BaseSAE, tensors: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Write this rank's tensors into its file, and on the first rank the index. Returns the digests of all files."""
    axis = latent_axis()
    if axis.size == 1:
        return {WEIGHTS: write_recorded(folder / WEIGHTS, save(tensors))}
    axes, file = sae.latent_axes(), shard_name(axis.index, axis.size)
    keyed = {key_of(name, axes.get(name), sae.own_latents): t for name, t in tensors.items()}
    written = file, write_recorded(folder / file, save(keyed)), {key: t.nbytes for key, t in keyed.items()}
    files = gather_over_shards(written)
    digests = {file: digest for file, digest, _ in files}
    if axis.index == 0:
        index = format_json(index_of({file: sizes for file, _, sizes in files}))
        digests[INDEX] = write_recorded(folder / INDEX, index)
    return digests


def write_recorded(file: Path, content: bytes) -> str:
    """Write a file atomically, and return its digest."""
    write_atomically(file, content)
    return xxhash.xxh3_128_hexdigest(content)


def copy_sae(source: Path, folder: Path, provenance: dict[str, Any]) -> None:
    """Copy an SAE folder, with another provenance."""
    description = read_json(source / CONFIG) | {"provenance": provenance}
    for name in (*weight_files(source), PROBE):
        if (source / name).is_file():
            with (source / name).open("rb") as content, atomic_file(folder / name) as copy:
                shutil.copyfileobj(content, copy, 2**24)
    if "digests" in description:
        description["digests"] |= {CONFIG: digest_of_description(description)}
    write_json(folder / CONFIG, description)


def load_sae_folder(
    folder: str | Path,
    device: str | torch.device = "cpu",
    latents: range | None = None,
    checked: bool = False,
) -> BaseSAE:
    """Load the SAE that a run saved, in eval mode.

    On a mesh with sharded latents (parallel/mesh.py) each rank reads the latents that it holds, and nothing else.

    Args:
        folder: an SAE folder, or a run folder.
        device: where to put the SAE.
        latents: read these latents only. They are compared with their digests if the folder is one of several files.
        checked: the caller has called `check_sae_files`, which compares all digests.

    Raises:
        UserError: there is no SAE folder, a file cannot be read or changed since it was saved, the class is unknown,
            the tensors do not fit the config, the SAE does not reproduce its probe, or it has no such latents.
    """
    folder = sae_folder(folder)
    with explain_errors(folder), nullcontext() if latents is None else only_latents(latents):
        description = read_json(folder / CONFIG)
        check_description(folder, description)
        tensors = read_parts(folder)
        outline = check_shapes(folder, description, tensors)
        if latents not in (None, outline.own_latents):
            name = type(outline).__name__
            raise UserError(f"the latents of a {name} cannot be read by slice: leave out latents={latents}.")
        if not checked:
            check_digests(folder, description, files_to_check(folder, outline, tensors))
        sae = read_sae(description, outline, tensors, folder)
        if description.get("probe") == PROBE and latents is None:
            check_probe(sae.eval(), folder / PROBE)
    return sae.eval().to(device)


def read_sae(description: dict[str, Any], outline: BaseSAE, tensors: dict[str, list[Part]], folder: Path) -> BaseSAE:
    """Build the SAE that a config describes, and read its tensors.

    Raises:
        UserError: there is not enough memory.
        ValueError: a number is not finite.
    """
    check_memory(folder, sum(t.nbytes for t in outline.state_dict().values()))
    with nothing_drawn():
        sae: BaseSAE = BaseSAE.by_name(description["class"], description["config"])
    fill(sae, tensors)
    if bad := not_finite(sae.state_dict()):
        raise ValueError(f"{', '.join(bad)} not finite")
    return sae


@contextmanager
def explain_errors(folder: Path) -> Iterator[None]:
    """Turn what is raised about damaged files of an SAE folder into a UserError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as e:
        raise UserError(f"the SAE in {folder} cannot be read ({type(e).__name__}: {e}): save or copy it again.") from e


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def digest_of_description(description: dict[str, Any]) -> str:
    """Return the digest of config.json without its digests, whatever the order of its keys."""
    said = {name: value for name, value in description.items() if name != "digests"}
    return digest_of_json(said)


def check_description(folder: Path, description: dict[str, Any]) -> None:
    """Compare config.json with its own digest; warn if it has none.

    Raises:
        ValueError: it has changed since it was saved.
    """
    if unknown := sorted(description.keys() - KEYS):
        raise ValueError(f"{CONFIG} holds {', '.join(unknown)}, which no SAE has")
    if "digests" not in description:
        log.warning("%s was saved without digests: damage to its files cannot be noticed.", folder)
    elif description["digests"].get(CONFIG) != digest_of_description(description):
        raise ValueError(f"{CONFIG} changed since the SAE was saved")


def check_digests(folder: Path, description: dict[str, Any], names: list[str]) -> None:
    """Compare every byte of these files of an SAE folder, and of its probe, with the digests in its config.json.

    Raises:
        ValueError: a file has changed since it was saved.
    """
    if (digests := description.get("digests")) is None:
        return
    names = [*names, PROBE] if "probe" in description else names
    if changed := [name for name in names if digest_of_file(folder / name) != digests.get(name)]:
        raise ValueError(f"{' and '.join(changed)} changed since the SAE was saved")


def check_sae_files(folder: Path) -> None:
    """Compare every byte of an SAE folder with its digests.

    Raises:
        UserError: a file cannot be read, or changed since it was saved.
    """
    with explain_errors(folder):
        description = read_json(folder / CONFIG)
        check_description(folder, description)
        check_digests(folder, description, weight_files(folder))


def check_shapes(folder: Path, description: dict[str, Any], tensors: dict[str, list[Part]]) -> BaseSAE:
    """Compare the tensors that a config describes with those of the files, before memory for either is taken.

    Renames, in place, the tensors that an earlier version saved.

    Returns:
        The SAE, without memory.

    Raises:
        UserError: they differ.
    """
    with torch.device("meta"):
        sae: BaseSAE = BaseSAE.by_name(description["class"], description["config"])
    rename_old_tensors(sae, tensors, "")
    here, there = whole_shapes(sae), {name: shape_of(parts) for name, parts in tensors.items()}
    if wrong := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        name = wrong[0]
        raise UserError(
            f"the tensors of {folder / weight_files(folder)[0]} do not fit its {CONFIG}: {name} has shape "
            f"{there.get(name)} in the file, expected {here.get(name)}."
        )
    return sae


def sae_folder(folder: str | Path) -> Path:
    """Return the SAE folder: `folder` itself, or the one in a run folder.

    Raises:
        UserError: `folder` is neither an SAE folder nor a run folder with one.
    """
    folder = Path(folder)
    folder = folder / "sae" if (folder / "sae" / CONFIG).is_file() else folder
    if not (folder / CONFIG).is_file():
        if (folder / ".hydra").is_dir():
            raise UserError(f"the run in {folder} has not saved its SAE yet: run the same command again to finish it.")
        raise UserError(f"{folder} holds no {CONFIG}: give an SAE folder, such as <run folder>/sae.")
    return folder
