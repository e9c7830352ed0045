"""Train an SAE on a known dictionary and tell what it finds: `python -m sae_lab.planted sae=matryoshka`."""

from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import LambdaLR

from sae_lab.cli.entry import check_whole_numbers, entry_point
from sae_lab.runtime.checks import checked_number
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.screen import console, print_metrics
from sae_lab.saes.base import BaseSAE
from sae_lab.studies.planted_features import PlantedFeatures, recovery, train_on_planted
from sae_lab.training.options import check_optimizer
from sae_lab.training.run import has_frozen_dictionary


@entry_point("planted")
def main(cfg: DictConfig) -> float:
    keep_freed_memory()
    check_whole_numbers(cfg, {"planted.d_in": 2, "planted.n_trees": 1, "planted.n_children": 0, "planted.n_sites": 1})
    check_whole_numbers(cfg, {"n_latents": 1, "n_steps": 1, "batch_size": 1, "seed": 0})
    checked_number("planted.noise", cfg.planted.noise, 0)
    checked_number("planted.active", cfg.planted.active, above=0)
    check_optimizer(cfg)
    planted = PlantedFeatures(seed=cfg.seed, **cfg.planted)
    if planted.active > cfg.n_latents:  # k, which follows it, would be refused by a name that nobody typed
        raise UserError(f"planted.active={planted.active} is more than n_latents={cfg.n_latents}: change one of them.")
    sae: BaseSAE = instantiate(cfg.sae, d_in=planted.d_in, n_latents=cfg.n_latents, n_sources=planted.n_sites)
    if sae.n_inputs:
        raise UserError(
            "planted features lie on one site each, so a transcoder has nothing to predict: leave n_inputs=0."
        )
    if has_frozen_dictionary(sae):
        raise UserError("frozen_decoder=true would freeze a random dictionary, which finds nothing: leave it out.")
    optimizer = instantiate(cfg.optimizer)([p for p in sae.parameters() if p.requires_grad])
    schedule = LambdaLR(optimizer, partial(instantiate(cfg.schedule), n_steps=cfg.n_steps))
    train_on_planted(sae, planted, optimizer, schedule, cfg.n_steps, cfg.batch_size, seed=cfg.seed + 1)
    figures: dict[str, Any] = recovery(sae, planted)
    print_metrics(figures, Path(cfg.run_dir))
    settings = {"config": OmegaConf.to_container(cfg, resolve=True)}
    write_json(Path(cfg.run_dir) / "planted.json", figures | settings)
    console.print(f"  {cfg.run_dir}/planted.json", highlight=False, soft_wrap=True)
    return figures["mmcs"]


if __name__ == "__main__":
    main()
