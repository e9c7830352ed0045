"""Training from Python: the runs of the command, of SAEs and activations that exist already."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from omegaconf import DictConfig, OmegaConf

from sae_lab.activations.stream import StreamData
from sae_lab.api.activations import Activations, Array, as_activations
from sae_lab.api.composing import name_folder
from sae_lab.runs.checkpoint import check_checkpoint, origin_of
from sae_lab.runs.folder import FAILED, Run, has_checkpoint
from sae_lab.runs.loading import check_width
from sae_lab.runs.results import read_metrics
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder
from sae_lab.sweeps.lockstep import train_in_lockstep
from sae_lab.training.progress import Throughput, TrainingProgress
from sae_lab.training.run import Member, build_member, finish, hydra_files, in_batches_of_loss, open_run, train_member

STARTS: "WeakKeyDictionary[BaseSAE, dict[str, str | None]]" = WeakKeyDictionary()
"""What each SAE started from in each folder. A stopped run changes its SAE, and continues with the same config."""


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended.

    Attributes:
        sae: the SAE that was given, now trained and calibrated, in eval mode.
        metrics: the metrics by name, on the held-out activations.
        folder: the run folder, which every command reads: `evaluate`, `features`, `report`, `export`.
    """

    sae: BaseSAE
    metrics: dict[str, Any]
    folder: Path

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.metrics[name]:.4g}" for name in ("fvu", "l0") if name in self.metrics)
        return f"TrainedRun({shown}, folder={str(self.folder)!r}, sae={self.sae!r})"


@check_call
def train_sae(
    sae: BaseSAE,
    activations: Activations | Array,
    n_tokens: int | None = None,
    lr: float | str | None = None,
    *,
    batch_size: int | None = None,
    run_dir: str | Path | None = None,
    resume: str = "auto",
    progress: bool = True,
    overrides: Sequence[str] = (),
) -> TrainedRun:
    """Train an SAE in place, calibrate, save and evaluate it, as `python -m sae_lab.train` does, to the bit.

        sae = BatchTopKSAE(k=8, d_in=64, n_latents=512)
        run = train_sae(sae, x, n_tokens=500_000)       # x: (n, 64)
        run.metrics["fvu"], sae.threshold

    The weights start as they are. Called again with the same `run_dir`, a stopped run continues from its last
    checkpoint, and a complete one is read. What is None has the value of conf/train.yaml.

    Args:
        sae: the SAE.
        activations: where its activations come from; a tensor stands for its rows.
        n_tokens: activations to train on, which may be several passes.
        lr: learning rate; "auto" chooses one by width, latents and steps.
        batch_size: activations of a training step.
        run_dir: the run folder; None: a new one under outputs/, by date and time.
        resume: "auto", or "never" to start over in `run_dir`.
        progress: whether to show the progress.
        overrides: other settings, as on the command line: "schedule.warmup=0.1", "trainer.precision=bf16-mixed".

    Raises:
        UserError: a setting is invalid, the SAE does not fit the activations, or `run_dir` holds another run.
        SafeStop: a signal such as Ctrl-C arrived; a checkpoint is saved.
    """
    options = Options(n_tokens, lr, batch_size, resume, tuple(overrides))
    source = as_activations(activations, sae)
    cfg = config_of_run(sae, source, options, run_dir)
    run, data = open_run(cfg), in_batches_of_loss(cfg, source.data(cfg))
    if run.complete:
        return complete_run(sae, run, data)
    member = member_of(sae, cfg, run, data, [TrainingProgress()] if progress else [Throughput()])
    train_member(member, data)
    return TrainedRun(sae.eval(), read_metrics(run.folder), run.folder)


@check_call
def train_sae_group(
    saes: Sequence[BaseSAE] | Mapping[str, BaseSAE],
    activations: Activations | Array,
    n_tokens: int | None = None,
    lr: float | str | None = None,
    *,
    batch_size: int | None = None,
    run_dir: str | Path | None = None,
    resume: str = "auto",
    progress: bool = True,
    overrides: Sequence[str] = (),
) -> list[TrainedRun]:
    """Train several SAEs on the same batches, in one pass over the activations.

    Each is a run of its own in a folder of `run_dir`, named by its place or its name, and gets the same bits as by
    `train_sae` alone. Other arguments and errors are those of `train_sae`.

    Raises:
        UserError: a member failed; the others are trained and saved.
    """
    named = saes if isinstance(saes, Mapping) else {str(i): sae for i, sae in enumerate(saes)}
    if not named:
        raise UserError("saes is empty: give at least one SAE.")
    if len(set(map(id, named.values()))) < len(named):
        raise UserError("an SAE is twice in the group: give each member an SAE of its own.")
    if of_pairs := [name for name, sae in named.items() if sae.reads_previous]:
        raise UserError(f"{of_pairs[0]} trains on pairs of rows, which a group does not have: use train_sae for it.")
    options = Options(n_tokens, lr, batch_size, resume, tuple(overrides))
    source = as_activations(activations, next(iter(named.values())))
    whole = source.config() if run_dir is None else None
    if whole is not None:
        name_folder(whole)
    parent = Path(run_dir or whole.run_dir)  # type: ignore[union-attr]
    configs = {name: config_of_run(sae, source, options, parent / name) for name, sae in named.items()}
    runs = {name: open_run(cfg) for name, cfg in configs.items()}
    first = next(iter(configs.values()))
    data = in_batches_of_loss(first, source.data(first))
    trained = {name: complete_run(named[name], run, data) for name, run in runs.items() if run.complete}
    if waiting := {name: sae for name, sae in named.items() if name not in trained}:
        trained |= train_members(waiting, configs, runs, data, progress)
    return [trained[name] for name in named]


def train_members(
    saes: Mapping[str, BaseSAE],
    configs: Mapping[str, DictConfig],
    runs: Mapping[str, Run],
    data: StreamData,
    progress: bool,
) -> dict[str, TrainedRun]:
    """Train the SAEs of a group on one stream."""
    members: dict[str, Member] = {}
    for name in saes:
        callback = TrainingProgress() if progress and not members else Throughput()
        members[name] = member_of(saes[name], configs[name], runs[name], data.with_sites(data.sites), [callback])
    by_step = sorted(members.values(), key=lambda member: member.run.step)
    with ExitStack() as folders:
        for member in by_step:
            leader = None if member is by_step[0] else by_step[0].run.folder
            folders.enter_context(member.run.begin(hydra_files(member.cfg), leader))
        train_in_lockstep(by_step, data)
        failed = [member.run.folder / FAILED for member in by_step if (member.run.folder / FAILED).exists()]
        if alive := [member for member in members.values() if member.run.folder / FAILED not in failed]:
            finish(alive, data)
    if failed:
        raise UserError(f"{len(failed)} of {len(members)} SAEs failed: see {', '.join(map(str, failed))}.")
    folders_of = {name: member.run.folder for name, member in members.items()}
    return {name: TrainedRun(saes[name].eval(), read_metrics(folder), folder) for name, folder in folders_of.items()}


@dataclass(frozen=True)
class Options:
    """The settings of a run that a call gives; None: that of conf/train.yaml."""

    n_tokens: int | None
    lr: float | str | None
    batch_size: int | None
    resume: str
    overrides: tuple[str, ...]

    def as_overrides(self) -> list[str]:
        named = {"n_tokens": self.n_tokens, "optimizer.lr": self.lr, "batch_size": self.batch_size}
        given = [f"{key}={value}" for key, value in named.items() if value is not None]
        return [*given, f"resume={self.resume}", *self.overrides]


def config_of_run(sae: BaseSAE, source: Activations, options: Options, run_dir: str | Path | None) -> DictConfig:
    """Return the config by which the command would train such an SAE on these activations.

    Raises:
        UserError: several processes are asked for.
    """
    check_overrides(source, options.overrides)
    cfg = source.config(*options.as_overrides())
    if cfg.trainer.devices > 1:
        raise UserError("from Python an SAE trains in one process: for several, use the command with trainer=ddp.")
    if run_dir is not None:
        cfg.run_dir = str(run_dir)
    name_folder(cfg)
    OmegaConf.set_struct(cfg, False)
    sizes = {name: sae.config[name] for name in ("d_in", "n_latents", "n_sources")}
    settings = {name: value for name, value in sae.config.items() if name not in sizes}
    cfg.sae = {"_target_": f"{type(sae).__module__}.{type(sae).__qualname__}", **settings}
    cfg.n_latents = sizes["n_latents"]
    cfg.k = settings.get("k") or cfg.k
    cfg.init_from = start_of(sae, Path(cfg.run_dir), options.resume)
    OmegaConf.set_struct(cfg, True)
    return cfg


def check_overrides(source: Activations, overrides: Sequence[str]) -> None:
    """Raise a UserError for an override of what the objects of the call decide: the SAE, its weights, the model."""
    of_objects = dict.fromkeys(("sae", "k", "n_latents", "expansion", "init_from"), "the SAE")
    of_objects |= {"lm": "the language model"} if source.lm is not None else {}
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        owner = of_objects.get(key.partition(".")[0].partition("@")[0]) or ("the activations" if key == "data" else "")
        if owner:
            raise UserError(f"{override} has no effect on {owner} that you give: set it where you create {owner}.")


def start_of(sae: BaseSAE, folder: Path, resume: str) -> str | None:
    """Return what the SAE starts from: None for the initial weights of its config, else a digest of its weights."""
    known, key = STARTS.setdefault(sae, {}), str(folder.resolve())
    if key not in known or resume == "never" or not (has_checkpoint(folder) or (folder / "metrics.json").is_file()):
        fresh = digest_of(type(sae).from_config(sae.config))
        own = digest_of(sae)
        known[key] = None if own == fresh else f"weights with digest {own}"
    return known[key]


def digest_of(sae: BaseSAE) -> str:
    """Return a digest of everything that an SAE saves."""
    digest = xxhash.xxh3_128()
    for name, tensor in sae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def member_of(sae: BaseSAE, cfg: DictConfig, run: Run, data: StreamData, callbacks: list[Any]) -> Member:
    """Build the run of an SAE that exists already."""
    check_width(sae, data)
    return build_member(cfg, run, sae.train(), data, callbacks)


def complete_run(sae: BaseSAE, run: Run, data: StreamData) -> TrainedRun:
    """Read a complete run into its SAE.

    Raises:
        UserError: it was trained on other data; a stopped run finds that when it continues.
    """
    check_checkpoint(run.folder)
    data.check_began_with(origin_of(run.last_checkpoint, type(data).__name__))
    sae.load_state_dict(load_sae_folder(run.folder).state_dict())
    return TrainedRun(sae.eval(), read_metrics(run.folder), run.folder)
