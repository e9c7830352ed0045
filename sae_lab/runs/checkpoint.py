"""SAE folders (config.json + sae.safetensors), files that appear whole or not at all, and a checkpoint's soundness."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from sae_lab.runtime.errors import UserError


def checkpoint_content(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, with tensors that are not read."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
    return content


def check_readable(checkpoint: Path, remedy: str) -> int:
    """The step a checkpoint was saved at; every byte of it is read, as torch does not look at a file's checksums.

    Raises:
        UserError: it cannot be read, or is no checkpoint of ours; the sentence ends with `remedy`.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        content = checkpoint_content(checkpoint)
        missing = {"state_dict", "pytorch-lightning_version"} - content.keys()
        if missing:
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        return content["global_step"]
    except Exception as e:  # zipfile and torch raise BadZipFile, RuntimeError, UnpicklingError, EOFError, KeyError, ...
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({type(e).__name__}: {reason}): {remedy}") from e
