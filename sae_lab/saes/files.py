"""Save and load SAE folders: config.json, sae.safetensors and probe.safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically, write_json
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.probe import check_probe, make_probe

CONFIG, WEIGHTS, PROBE = "config.json", "sae.safetensors", "probe.safetensors"


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
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"class": type(sae).__name__, "config": sae.config, "provenance": provenance or {}}
    if probe_rows is not None:
        config["probe"] = PROBE
        write_atomically(folder / PROBE, make_probe(sae, probe_rows))
    # Copied, because safetensors refuses two names for the same memory, which tied weights have.
    tensors = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in sae.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(tensors))
    write_json(folder / CONFIG, config)
    return folder


def load_sae_folder(folder: str | Path, device: str | torch.device = "cpu") -> BaseSAE:
    """Load the SAE that a run saved, in eval mode.

    Args:
        folder: an SAE folder, or a run folder.
        device: where to put the SAE.

    Raises:
        UserError: there is no SAE folder, a file cannot be read, the class is unknown, the tensors do not fit the
            config, or the SAE does not reproduce its probe.
    """
    folder = sae_folder(folder)
    try:
        description = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        not_finite = [name for name, t in tensors.items() if not t.isfinite().all()]
        if not_finite:
            raise ValueError(f"{', '.join(not_finite)} not finite")
        sae = BaseSAE.from_config(description["class"], description["config"])
        sae.load_state_dict(tensors)
        if "probe" in description:
            check_probe(sae.eval(), folder / PROBE)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as e:
        raise UserError(f"the SAE in {folder} cannot be read ({type(e).__name__}: {e}): save or copy it again.") from e
    except RuntimeError as e:  # load_state_dict: missing, unexpected or misshapen tensors
        raise UserError(f"the tensors of {folder / WEIGHTS} do not fit its {CONFIG}: {' '.join(str(e).split())}") from e
    return sae.eval().to(device)


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
