"""Generate text with a latent of an SAE steered: `python -m sae_lab.steer sae=outputs/... latent=17`."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf

from sae_lab.cli.entry import entry_point
from sae_lab.cli.replaced import allow_new_keys, open_from, typed_options
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/steer.yaml."""

    sae_id: str | None
    out: str | None
    latent: Annotated[int, Ge(0)]
    strength: Sequence[float] | float
    prompt: str
    n_new: Annotated[int, Ge(1)]
    n_samples: Annotated[int, Ge(1)]
    temperature: Annotated[float, Ge(0)]
    seed: int
    n_tokens: Annotated[int, Ge(1)]
    device: str
    trust: Sequence[str] | str


OF_TEXT = ("latent", "mode", "strength", "unit", "prompt", "n_new", "n_samples", "temperature", "seed", "n_tokens")


@entry_point("steer", allow_new_keys)
def main(cfg: DictConfig) -> None:
    from sae_lab.activations.building import require_text
    from sae_lab.evaluation.steering import Sampling, check_choice, steer
    from sae_lab.runs.pages import name_of_strength, write_steering
    from sae_lab.runs.replacements import suffix_of
    from sae_lab.runtime.errors import UserError
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_files, print_table

    check_config(cfg, Options)
    check_choice(cfg.mode, cfg.unit)
    strengths = [*cfg.strength] if OmegaConf.is_list(cfg.strength) else [cfg.strength]
    if not strengths:
        raise UserError("strength=[] is empty: give a number or a list of numbers, such as strength=[1,2,4].")
    keep_freed_memory()
    opened = open_from(cfg)
    found = {"sae": opened.name} | steer(
        opened.sae,
        require_text(opened.data, "steer"),
        cfg.latent,
        cfg.prompt,
        strengths,
        mode=cfg.mode,
        unit=cfg.unit,
        n_tokens=cfg.n_tokens,
        sampling=Sampling(cfg.n_new, cfg.n_samples, cfg.temperature, cfg.seed),
    )
    columns = ("strength", "ce", "ce_increase", "kl", "text")
    rows = [
        [name_of_strength(row, cfg.mode), *(row[name] for name in columns[1:4]), repr(row["texts"][0])]
        for row in found["table"]
    ]
    print_table(f"latent {cfg.latent} of {opened.name}", columns, rows)
    print_files(write_steering(found, opened.folder, suffix_of(typed_options(cfg, *OF_TEXT) | opened.settings)))


if __name__ == "__main__":
    main()
