"""Train an SAE, `python -m sae_lab.train`: compose, build data, module and trainer, fit, calibrate, save, evaluate."""

import json
import logging
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from sae_lab.checkpoint import AtomicCheckpointIO, load_sae, save_sae
from sae_lab.cli import entry_point
from sae_lab.data import ActivationData
from sae_lab.errors import UserError
from sae_lab.evaluate import calibrate, evaluate, write_results
from sae_lab.interrupt import StopOnSignal
from sae_lab.memory import keep_freed_memory
from sae_lab.module import SAEModule
from sae_lab.provenance import provenance
from sae_lab.runs import Run, examine
from sae_lab.saes.base import BaseSAE
from sae_lab.screen import TrainingProgress, print_files, print_metrics

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """One run, from wherever its folder stands to its metrics."""
    check_dials(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    run = examine(Path(cfg.run_dir), config, cfg.resume)
    if run.complete:
        return show_complete(run)
    keep_freed_memory()
    data: ActivationData = instantiate(cfg.data, lm=instantiate(cfg.lm))
    sae = build_sae(cfg, data)
    if cfg.init_from is not None and run.checkpoint is None:
        sae.start_from(load_sae(cfg.init_from))
    schedule = partial(instantiate(cfg.schedule), n_steps=data.n_steps)
    module = SAEModule({"sae": sae}, instantiate(cfg.optimizer), schedule, cfg.max_grad_norm)
    trainer: L.Trainer = instantiate(cfg.trainer)(run_dir=run.folder, n_steps=data.n_steps)
    run.begin(hydra_files(cfg))  # all that can be wrong with the config has shown by now
    trainer.loggers = [instantiate(node) for node in cfg.logger.values()]
    fit(trainer, module, data, run)
    sae.to(data.lm.device)  # Lightning moves it to the CPU when it is done
    calibrate([sae], data, cfg.calibration_batches)
    save_sae(sae, run.folder / "sae", provenance(config, data.lm), data.probe_rows())
    evaluation = evaluate(sae, data)
    files = write_results(evaluation, sae, run.folder)
    print_metrics(evaluation.metrics, run.folder)
    print_files([run.folder / "sae", *files])
    return evaluation.metrics


def check_dials(cfg: DictConfig) -> None:
    """Refuse a dial that is no number, no whole one where only that makes sense, or too small; `null` passes."""
    whole = {"n_latents": 1, "n_tokens": 1, "batch_size": 1, "seq_len": 2, "seed": 0, "calibration_batches": 1}
    whole |= {f"trainer.{name}": 1 for name in ("checkpoint_every", "validate_every", "log_every")}
    for key, least in (whole | {"k": 0, "expansion": 0, "max_grad_norm": 0, "optimizer.lr": 0}).items():
        value = OmegaConf.select(cfg, key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and value >= least and (key not in whole or value == int(value))):
            raise UserError(f"{key}={value} must be a {'whole ' if key in whole else ''}number of at least {least}.")
    if cfg.init_from is None and OmegaConf.select(cfg, "sae.frozen_decoder"):
        raise UserError("sae.frozen_decoder=true would freeze a random dictionary: give init_from=<folder of an SAE>.")


def build_sae(cfg: DictConfig, data: ActivationData) -> BaseSAE:
    """The SAE that `sae=...` names, with n_latents latents, or expansion times the width of an activation."""
    n_latents = cfg.n_latents or int(cfg.expansion * data.d_in)
    if n_latents < 1:
        raise UserError(f"expansion={cfg.expansion} of width {data.d_in} leaves no latent: raise expansion.")
    return instantiate(cfg.sae, d_in=data.d_in, n_latents=n_latents, n_sources=data.n_sources)


def build_trainer(
    run_dir: Path,
    n_steps: int,
    accelerator: str,
    precision: str,
    checkpoint_every: int,
    validate_every: int,
    log_every: int,
) -> L.Trainer:
    """A Lightning Trainer for one pass over a stream of n_steps batches.

    Its length comes from max_steps and the stream; Lightning 2.6 loses its place on resume where anything asks it to
    estimate the number of steps.

    Raises:
        UserError: an accelerator that is not there, an unknown precision, an interval that is not positive.
    """
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoints = run_dir / "checkpoints"
    saving = ModelCheckpoint(checkpoints, "last", every_n_train_steps=checkpoint_every, enable_version_counter=False)
    callbacks: list[Callback] = [saving, StopOnSignal(checkpoints / "last.ckpt"), TrainingProgress()]
    noise = "does not have many workers|dataloader is not resumable|LeafSpec|Checkpoint directory .* exists"
    warnings.filterwarnings("ignore", message=f".*({noise}).*")
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=1,
            max_steps=n_steps,
            val_check_interval=min(validate_every, n_steps),
            log_every_n_steps=min(log_every, n_steps),
            num_sanity_val_steps=0,
            logger=False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=run_dir,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as e:
        raise UserError(f"the trainer cannot be built: {' '.join(str(e).split())}") from e


def fit(trainer: L.Trainer, module: SAEModule, data: ActivationData, run: Run) -> None:
    """Train to the end of the stream, from the folder's checkpoint where there is one; leave one of the last step."""
    log.info("training %d steps of %d tokens in %s", data.n_steps, data.batch_size, run.folder)
    trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    if trainer.global_step < data.n_steps:
        log.warning("the text ended at step %d of %d (data.repeat=false)", trainer.global_step, data.n_steps)
    trainer.save_checkpoint(run.folder / "checkpoints" / "last.ckpt")


def hydra_files(cfg: DictConfig) -> dict[str, str]:
    """`.hydra/` as Hydra writes it, but resolved."""
    files = {"config.yaml": OmegaConf.to_yaml(cfg, resolve=True)}
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        files["hydra.yaml"] = OmegaConf.to_yaml(OmegaConf.masked_copy(OmegaConf.create({"hydra": hydra}), "hydra"))
        files["overrides.yaml"] = OmegaConf.to_yaml(hydra.overrides.task)
    return files


def show_complete(run: Run) -> dict[str, Any]:
    """Say that there is nothing left to do, and show what there is."""
    metrics = json.loads((run.folder / "metrics.json").read_text())
    print_metrics(metrics, run.folder)
    log.info("%s is complete: type resume=never to train it again.", run.folder)
    return metrics


@entry_point("train")
def main(cfg: DictConfig) -> float:
    return train(cfg)["fvu"]


if __name__ == "__main__":
    main()
