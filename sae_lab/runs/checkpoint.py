"""Reading and verifying Lightning checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae_lab.runs.digests import CHECKPOINT, check_unaltered
from sae_lab.runs.sharded_checkpoint import SHARDS, check_shards, remove_shards
from sae_lab.runtime.archives import check_torch
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.memory import check_memory
from sae_lab.saes.base import BaseSAE, rename_old_tensors
from sae_lab.saes.weights import whole_shapes


def checkpoint_content(checkpoint: Path, every_part: bool = False) -> dict[str, Any]:
    """Load a checkpoint without its tensors (they are on the meta device); `every_part` verifies them on disk."""
    check_torch(checkpoint, every_part=every_part)
    content: dict[str, Any] = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
    return content


def check_checkpoint(folder: Path) -> int:
    """Verify the checkpoint of a run folder and return the step at which it was saved.

    Raises:
        UserError: it is damaged, missing, or of another run or step.
    """
    known = check_unaltered(folder, CHECKPOINT)
    return check_readable(folder / CHECKPOINT, "type resume=never to start again.", every_part=not known)


def check_readable(checkpoint: Path, remedy: str, every_part: bool = True) -> int:
    """Verify a checkpoint and return the step at which it was saved.

    Args:
        every_part: read the whole file to verify the checksums of its parts, which torch does not do.

    Raises:
        UserError: it is damaged, or not a checkpoint of this library. The message ends with `remedy`.
    """
    with explain_errors(checkpoint, remedy):
        check_memory(checkpoint, checkpoint.stat().st_size)
        content = checkpoint_content(checkpoint, every_part)
        if missing := {"state_dict", "pytorch-lightning_version", "global_step"} - content.keys():
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        check_shards(checkpoint, content)
        return int(content["global_step"])


def check_fits(checkpoint: Path, module: nn.Module, data: str) -> None:
    """Raise a UserError unless a checkpoint has all that a run resumes: a run without digests may hold another's.

    Args:
        module: the LightningModule, whose SAE is its attribute `sae` and may be a shard of the whole.
        data: class name of the run's DataModule.
    """
    content = checkpoint_content(checkpoint)
    there = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
    rename_old_tensors(module, there, "sae.")
    here = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert isinstance(module.sae, BaseSAE)
    here |= whole_shapes(module.sae, "sae.")
    parts = ("optimizer_states", "lr_schedulers", "loops", data)
    wrong = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if wrong := [*wrong, *(part for part in parts if not content.get(part))]:
        raise UserError(
            f"the checkpoint {checkpoint} is not of this run ({wrong[0]} differs): put back its own, or type "
            "resume=never to start again."
        )


def origin_of(checkpoint: Path, data: str) -> dict[str, str]:
    """Return the digests of model and text that a run began with; empty if its checkpoint has none.

    Args:
        data: class name of the run's DataModule.

    Raises:
        UserError: the checkpoint is damaged.
    """
    with explain_errors(checkpoint, "restore it, or delete it to do without its digests of model and text."):
        return dict(checkpoint_content(checkpoint).get(data, {}).get("origin", {}))


def remove_unfinished_shards(checkpoint: Path) -> None:
    """Remove the shards that a killed process wrote for a checkpoint that does not name them."""
    remove_shards(checkpoint, but=checkpoint_content(checkpoint).get(SHARDS, {}).get("folder"))


@contextmanager
def explain_errors(checkpoint: Path, remedy: str) -> Iterator[None]:
    """Turn all that zipfile and torch raise on a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # BadZipFile, RuntimeError, UnpicklingError, EOFError, KeyError, ...
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({type(e).__name__}: {reason}): {remedy}") from e
