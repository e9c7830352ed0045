"""Reading and verifying Lightning checkpoints."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from sae_lab.runtime.errors import UserError


def checkpoint_content(checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint without reading its tensors (they are on the meta device)."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
    return content


def check_readable(checkpoint: Path, remedy: str) -> int:
    """Verify a checkpoint and return the step at which it was saved.

    Reads the whole file to verify the checksums of its parts, which torch does not do.

    Raises:
        UserError: it is damaged, or not a checkpoint of this library. The message ends with `remedy`.
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
