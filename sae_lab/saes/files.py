"""Save and load SAE folders: config.json, sae.safetensors and probe.safetensors."""

import logging
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_file, digest_of_json, read_json, write_atomically, write_json
from sae_lab.runtime.memory import check_memory
from sae_lab.saes.base import BaseSAE, rename_old_tensors
from sae_lab.saes.probe import check_probe, make_probe

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, PROBE = "config.json", "sae.safetensors", "probe.safetensors"
KEYS = {"class", "config", "provenance", "probe", "digests"}
"""Of config.json. Any other is damage: a flipped bit in the word `digests` must not switch the check off."""


def save_sae(
    sae: BaseSAE,
    folder: str | Path,
    provenance: dict[str, Any] | None = None,
    probe_rows: Float[Tensor, "n s d"] | None = None,
) -> Path:
    """Write an SAE folder: config.json (class, arguments, provenance) and sae.safetensors (parameters and buffers).

    Args:
        sae: the SAE to save.
        folder: the folder to write into; created if needed.
        provenance: where the SAE comes from, written into config.json.
        probe_rows: raw activations. They are saved with the SAE's outputs in probe.safetensors, which loading checks.

    Raises:
        UserError: a parameter or a buffer is not finite, such as a threshold of infinity; nothing is written.
    """
    folder = Path(folder)
    description = {"class": type(sae).__name__, "config": sae.config, "provenance": provenance or {}}
    # Copied, because safetensors refuses two names for the same memory, which tied weights have.
    tensors = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in sae.state_dict().items()}
    if bad := not_finite(tensors):
        raise UserError(f"{', '.join(bad)} of the {type(sae).__name__} not finite, so it is not saved: train it again.")
    files = {WEIGHTS: save(tensors)}
    if probe_rows is not None:
        description["probe"] = PROBE
        files[PROBE] = make_probe(sae, probe_rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    digests = {name: xxhash.xxh3_128_hexdigest(content) for name, content in files.items()}
    write_json(folder / CONFIG, description | {"digests": digests | {CONFIG: digest_of_description(description)}})
    return folder


def copy_sae(source: Path, folder: Path, provenance: dict[str, Any]) -> None:
    """Copy an SAE folder, with another provenance."""
    description = read_json(source / CONFIG) | {"provenance": provenance}
    for name in (WEIGHTS, PROBE):
        if (source / name).is_file():
            write_atomically(folder / name, (source / name).read_bytes())
    if "digests" in description:
        description["digests"] |= {CONFIG: digest_of_description(description)}
    write_json(folder / CONFIG, description)


def load_sae_folder(folder: str | Path, device: str | torch.device = "cpu") -> BaseSAE:
    """Load the SAE that a run saved, in eval mode.

    Args:
        folder: an SAE folder, or a run folder.
        device: where to put the SAE.

    Raises:
        UserError: there is no SAE folder, a file cannot be read or changed since it was saved, the class is unknown,
            the tensors do not fit the config, or the SAE does not reproduce its probe.
    """
    folder = sae_folder(folder)
    try:
        description = read_json(folder / CONFIG)
        check_digests(folder, description)
        check_memory(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size)
        check_shapes(folder / WEIGHTS, description)
        tensors = load_file(folder / WEIGHTS)
        if bad := not_finite(tensors):
            raise ValueError(f"{', '.join(bad)} not finite")
        sae = BaseSAE.by_name(description["class"], description["config"])
        sae.load_state_dict(tensors)
        if description.get("probe") == PROBE:
            check_probe(sae.eval(), folder / PROBE)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as e:
        raise UserError(f"the SAE in {folder} cannot be read ({type(e).__name__}: {e}): save or copy it again.") from e
    except RuntimeError as e:  # load_state_dict: missing, unexpected or misshapen tensors
        raise UserError(f"the tensors of {folder / WEIGHTS} do not fit its {CONFIG}: {' '.join(str(e).split())}") from e
    return sae.eval().to(device)


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def digest_of_description(description: dict[str, Any]) -> str:
    """Return the digest of config.json without its digests, whatever the order of its keys."""
    said = {name: value for name, value in description.items() if name != "digests"}
    return digest_of_json(said)


def check_digests(folder: Path, description: dict[str, Any]) -> None:
    """Check every byte of an SAE folder against the digests in its config.json; warn where it has none.

    Raises:
        ValueError: a file has changed since it was saved.
    """
    if unknown := sorted(description.keys() - KEYS):
        raise ValueError(f"{CONFIG} holds {', '.join(unknown)}, which no SAE has")
    digests = description.get("digests")
    if digests is None:
        log.warning("%s was saved without digests: damage to its files cannot be noticed.", folder)
        return
    names = [WEIGHTS, PROBE] if "probe" in description else [WEIGHTS]
    found = {name: digest_of_file(folder / name) for name in names} | {CONFIG: digest_of_description(description)}
    if changed := [name for name in found if found[name] != digests.get(name)]:
        raise ValueError(f"{' and '.join(changed)} changed since the SAE was saved")


def check_shapes(file: Path, description: dict[str, Any]) -> None:
    """Compare the tensors that a config describes with those of a file, before memory for either is taken.

    Raises:
        UserError: they differ.
    """
    with safe_open(file, "pt") as tensors:
        there = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    with torch.device("meta"):
        sae = BaseSAE.by_name(description["class"], description["config"])
    rename_old_tensors(sae, there, "")
    here = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    if wrong := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        name = wrong[0]
        raise UserError(
            f"the tensors of {file} do not fit its {CONFIG}: {name} has shape {there.get(name)} in the file, "
            f"expected {here.get(name)}."
        )


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
