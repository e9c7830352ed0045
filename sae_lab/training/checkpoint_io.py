"""Writes and reads checkpoints for the Lightning Trainer: atomically, recorded, with sharded latents in files apart."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sae_lab.parallel.mesh import data_axis, latent_axis, rank
from sae_lab.runs.digests import recorded
from sae_lab.runs.sharded_checkpoint import SHARDS, remove_shards, write_shards
from sae_lab.runtime.files import atomic_file, digest_of_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints atomically. Lightning moves a file from /tmp, which is not atomic across file systems.

    All ranks call it. Rank 0 writes the file; before it, those of its row of the mesh write their shards (see
    runs/sharded_checkpoint.py).

    Args:
        run_dir: the folder whose digests.json records the checkpoints that are saved in it.
    """

    def __init__(self, run_dir: Path):
        super().__init__()
        self.run_dir = run_dir.resolve()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path).resolve()
        shards = checkpoint.get(SHARDS)
        if shards is not None and data_axis().index == 0:
            checkpoint[SHARDS] = write_shards(shards, path, checkpoint["global_step"])
        if rank() == 0:
            self.write(checkpoint, path)
            remove_shards(path, but=checkpoint[SHARDS]["folder"] if shards is not None else None)

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write the file, and record its digest."""
        with ExitStack() as replaced, atomic_file(path) as f:
            torch.save(checkpoint, f)
            f.flush()
            if path.is_relative_to(self.run_dir):
                name = path.relative_to(self.run_dir).as_posix()
                replaced.enter_context(recorded(self.run_dir, {name: digest_of_file(Path(f.name))}))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint. A rank that holds some of the latents maps the file, so that it reads what it takes."""
        if latent_axis().size == 1:
            content = super().load_checkpoint(path, weights_only=weights_only)
        else:
            content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        if SHARDS in content:
            content[SHARDS]["folder"] = str(Path(path).with_name(content[SHARDS]["folder"]))
        loaded: dict[str, Any] = content
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        if rank() == 0:
            super().remove_checkpoint(path)
            remove_shards(Path(path), but=None)
