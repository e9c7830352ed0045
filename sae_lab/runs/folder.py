"""Run folders: their config, the state of the run, and whether it can be resumed."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from omegaconf import OmegaConf

from sae_lab.runs.checkpoint import check_checkpoint, remove_unfinished_shards
from sae_lab.runs.config import config_file, read_config
from sae_lab.runs.digests import CHECKPOINT, DIGESTS, METRICS, digest_in, is_recorded, recorded, warn_if_unchecked
from sae_lab.runs.growth import SIZES, ends_with_smaller_batch, reason_not_to_grow
from sae_lab.runs.lock import lock_folder
from sae_lab.runs.paths import CACHED, may_move, with_absolute_paths
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import remove_unfinished, write_atomically

log = logging.getLogger(__name__)

FAILED = "failed.txt"

# Files of a run besides `.hydra/`. A run that starts again in the same folder removes them.
RUN_FILES = (
    "checkpoints",
    "sae",
    "steps",
    "best",
    "figures",
    "features",
    "tensorboard",
    "wandb",
    METRICS,
    "metrics.csv",
)
# Files of evaluations of the run: under another rule, with another encoder, with other settings (replacements.py), or
# with a steered latent.
EVALUATIONS = ("metrics_*.json", "figures_*=*", "features_*=*", "steer_*=*")

# Keys that may change when a run is resumed: they decide where and how it runs, not what it computes.
MAY_CHANGE = (
    "resume",
    "run_dir",
    "goal_l0",
    "logger",
    "callbacks",
    "metric",
    "lm.device",
    "lm.device_map",
    "lm.devices",
    "data.prefetch",
    "data.lm_batch_tokens",
    "data.copies_gb",
    "trainer.accelerator",
    "trainer.capture",
    "trainer.products",
    "trainer.devices",
    "trainer.micro_batches",
    "trainer.shard_latents",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.validate_every",
)

# Keys that may change as well where the run reads text: the order in which a cache is read depends on them. Unlike
# those above, they are part of the names of a sweep's job folders.
MAY_CHANGE_ON_TEXT = ("data.lm_batch_rows",)


@dataclass(frozen=True)
class Run:
    """State of a run folder.

    Args:
        step: step of the checkpoint to resume from; 0: start from the beginning.
        complete: metrics.json exists.
    """

    folder: Path
    step: int
    complete: bool

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or None."""
        return self.last_checkpoint if self.step else None

    @contextmanager
    def begin(self, files: dict[str, str], leader: Path | None = None) -> Iterator[None]:
        """Lock the folder, write `.hydra/`, and remove the files of an earlier run unless this one resumes it.

        Args:
            files: content of `.hydra/` by file name.
            leader: folder of a run of the same group that has begun before this one and ends after it.

        Raises:
            FolderInUse: another process is training in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder, leader):
            if self.checkpoint is None:
                clear_folder(self.folder)
            (self.folder / METRICS).unlink(missing_ok=True)  # of a complete run whose n_tokens has grown
            for name in ("checkpoints", "sae", ".hydra"):
                remove_unfinished(self.folder / name)
            if self.checkpoint is not None:
                remove_unfinished_shards(self.checkpoint)
            self._write_settings(files)
            yield

    def _write_settings(self, files: dict[str, str]) -> None:
        """Write `.hydra/`, and record its files and the checkpoint (or that there is none) in digests.json."""
        contents = {f".hydra/{name}": text.encode() for name, text in files.items()}
        digests = {name: xxhash.xxh3_128_hexdigest(content) for name, content in contents.items()}
        with recorded(self.folder, digests | {CHECKPOINT: digest_in(self.folder, CHECKPOINT)}, begin=True):
            for name, content in contents.items():
                write_atomically(self.folder / name, content)


def examine_folder(folder: Path, config: Any, resume: str) -> Run:
    """Return the state of `folder` for a run with this (resolved) config. Writes nothing.

    Raises:
        UserError: the folder holds a run of another config or damaged files, or `resume` is unknown.
    """
    if resume not in ("auto", "never"):
        raise UserError(f"resume={resume} is not known: choose auto (continue the run in this folder) or never.")
    check_links(folder)
    complete = (folder / METRICS).is_file()
    if resume == "never" or not (complete or has_checkpoint(folder)):  # no checkpoint: any config may start
        found = [name for name in RUN_FILES if (folder / name).exists()]
        if found and not config_file(folder).is_file():
            raise UserError(
                f"{folder} is not a run folder, but holds {', '.join(found)}: choose another hydra.run.dir."
            )
        return Run(folder, 0, False)
    step = 0 if complete else check_checkpoint(folder)
    if not config_file(folder).is_file():
        raise UserError(f"{folder} has lost its .hydra/config.yaml: put it back, or type resume=never to start again.")
    there = OmegaConf.to_container(read_config(folder))
    grows = complete and flatten(there).get("n_tokens") != flatten(config).get("n_tokens")
    complete = complete and not grows
    # A complete run shows its metrics and loads nothing, so no digest would tell that another model was meant.
    raise_if_config_differs(folder, there, config, () if complete else may_move(config))
    step = check_checkpoint(folder) if grows else step
    if ends_with_smaller_batch(flatten(there), step):
        log.warning("the last batch of %s was smaller: a run of the full length in one go differs a little.", folder)
    warn_if_unchecked(folder)
    return Run(folder, step, complete)


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run has saved a checkpoint, even if it is missing now."""
    return (folder / CHECKPOINT).is_file() or is_recorded(folder, CHECKPOINT)


def check_links(folder: Path) -> None:
    """Raise a UserError if the folder holds a link that leads out of it: what is written there would land elsewhere."""
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(f"{path} is a link that leads out of {folder}: replace it by what it points to.")


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    named = [folder / name for name in (DIGESTS, *RUN_FILES, ".hydra", FAILED)]
    found = [path for pattern in (*EVALUATIONS, "rank_*.log") for path in folder.glob(pattern)]
    for path in (*named, *found):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def raise_if_config_differs(folder: Path, there: Any, here: Any, moving: Sequence[str] = ()) -> None:
    """Raise a UserError that names the keys that differ, unless all may differ: MAY_CHANGE, `moving`, more tokens."""
    theirs, ours = flatten(with_absolute_paths(there)), flatten(with_absolute_paths(here))
    differing = differing_keys(there, here, moving)
    if differing and set(differing) <= set(SIZES):
        if reason := reason_not_to_grow(theirs, ours):
            raise UserError(
                f"{folder} is a run of n_tokens={theirs['n_tokens']} and cannot continue to {ours['n_tokens']} "
                f"({reason}): give another hydra.run.dir, with init_from={folder} to start from its weights."
            )
    elif differing:
        shown = ", ".join(f"{k} is {theirs.get(k)} there and {ours.get(k)} here" for k in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"{folder} holds a run of another config ({shown}{more}): "
            "choose another hydra.run.dir, or type resume=never to start again in it."
        )


def differing_keys(there: Any, here: Any, moving: Sequence[str] = ()) -> list[str]:
    """Return the keys in which two configs differ, but for those that change no number; the outermost first."""
    theirs, ours = flatten(with_absolute_paths(there)), flatten(with_absolute_paths(here))
    on_text = () if ours.get("data._target_") == CACHED else MAY_CHANGE_ON_TEXT
    free = (*MAY_CHANGE, *on_text, *moving)
    by_depth = sorted(theirs | ours, key=lambda k: (k.count("."), k))
    keys = [k for k in by_depth if not any(k == f or k.startswith(f"{f}.") for f in free)]
    return [k for k in keys if single(theirs.get(k)) != single(ours.get(k))]


def single(value: Any) -> Any:
    """Return the value of a list of one: settings that take a list take its only value, too."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config: {"a": {"b": value}} → {"a.b": value}, and {"a": [{"b": value}]} → {"a[0].b": value}."""
    if isinstance(config, dict) and config:
        children = {f"{prefix}.{key}" if prefix else str(key): node for key, node in config.items()}
    elif isinstance(config, list) and any(isinstance(node, dict) for node in config):
        children = {f"{prefix}[{i}]": node for i, node in enumerate(config)}
    else:
        return {prefix: config}
    return {k: v for key, node in children.items() for k, v in flatten(node, key).items()}
