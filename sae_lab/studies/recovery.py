"""Train an SAE on planted features, and measure what of them it recovers."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import LambdaLR

from sae_lab.runtime.build import build
from sae_lab.runtime.checks import check_config
from sae_lab.runtime.errors import UserError, settings_under
from sae_lab.runtime.files import write_json
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.plain_text import for_terminal
from sae_lab.runtime.screen import console, print_metrics
from sae_lab.saes.base import BaseSAE
from sae_lab.studies.planted_features import PlantedFeatures, recovery, train_on_planted
from sae_lab.training.options import check_optimizer
from sae_lab.training.run import has_frozen_dictionary


class Options(TypedDict):
    """The top-level options of conf/planted.yaml."""

    n_latents: Annotated[int, Ge(1)]
    n_steps: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    seed: Annotated[int, Ge(0)]
    run_dir: str


def measure_recovery(cfg: DictConfig) -> dict[str, Any]:
    """Train an SAE on planted features and write what it recovers to planted.json."""
    keep_freed_memory()
    check_config(cfg, Options)
    check_optimizer(cfg)
    with settings_under("planted"):
        planted = PlantedFeatures(seed=cfg.seed, **cfg.planted)
    if planted.active > cfg.n_latents:  # else the error would name k, which the user did not set
        raise UserError(f"planted.active={planted.active} is more than n_latents={cfg.n_latents}: change one of them.")
    sae: BaseSAE = build(cfg, "sae", d_in=planted.d_in, n_latents=cfg.n_latents, n_sources=planted.n_sites)
    if sae.n_inputs:
        raise UserError(
            "planted features lie on one site each, so a transcoder has nothing to predict: leave n_inputs=0."
        )
    if has_frozen_dictionary(sae):
        raise UserError("frozen_decoder=true would freeze a random dictionary, which finds nothing: leave it out.")
    optimizer = build(cfg, "optimizer")([p for p in sae.parameters() if p.requires_grad])
    schedule = LambdaLR(optimizer, partial(build(cfg, "schedule"), n_steps=cfg.n_steps))
    train_on_planted(sae, planted, optimizer, schedule, cfg.n_steps, cfg.batch_size, seed=cfg.seed + 1)
    figures: dict[str, Any] = recovery(sae, planted)
    print_metrics(figures, Path(cfg.run_dir))
    settings = {"config": OmegaConf.to_container(cfg, resolve=True)}
    write_json(Path(cfg.run_dir) / "planted.json", figures | settings)
    console.print(for_terminal(f"  {cfg.run_dir}/planted.json"), highlight=False, soft_wrap=True)
    return figures
