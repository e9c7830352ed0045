"""Language models by name, or of a module."""

from collections.abc import Sequence
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

from sae_lab.api.composing import compose_config
from sae_lab.cli.help import CONF
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.paired import PairedLM
from sae_lab.runtime.build import build
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError


@check_call
def load_lm(
    model: str | nn.Module,
    sites: Sequence[str] | str | None = None,
    tokenizer: Any = None,
    backend: str | None = None,
    **options: Any,
) -> LanguageModel:
    """Load a frozen language model, to be read and replaced at `sites`.

    Args:
        model: a file of conf/lm (tiny, gpt2, ...), a hub name or a folder; or a module that exists already.
        sites: site names; None: those of conf/lm. An unknown one raises an error that lists the choices.
        tokenizer: hub name or folder of another tokenizer; for a module, its tokenizer.
        backend: transformers, transformer_lens or nnsight; None: that of conf/lm, else transformers.
        options: other settings of conf/lm/transformers.yaml, such as dtype=torch.bfloat16, device="cuda"; for a module,
            `name` and `bos_id`.

    Raises:
        UserError: the model cannot be loaded, a site is unknown, or a module comes without a tokenizer.
    """
    options = {name: as_setting(value) for name, value in options.items()}
    named = isinstance(model, str) and (CONF / "lm" / f"{model}.yaml").is_file()
    cfg = compose_config(f"lm={backend or (model if named else 'transformers')}")
    OmegaConf.set_struct(cfg, False)
    if named and backend:
        cfg.lm = OmegaConf.merge(compose_config(f"lm={model}").lm, {"_target_": cfg.lm._target_})
    given = {"sites": sites} | ({} if isinstance(model, nn.Module) else {"tokenizer": tokenizer, **options})
    for name, value in given.items():
        if value is not None:
            cfg.lm[name] = value if isinstance(value, str | int | float | bool) else OmegaConf.create(value)
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise UserError("a module has no tokenizer of its own: give tokenizer=...")
        back_end: Any = get_class(cfg.lm._target_)
        lm = back_end.from_modules(model, tokenizer, sites, **options)
        cfg.lm.name, cfg.lm.sites = lm.name, list(lm.sites)
    else:
        cfg.lm.name = cfg.lm.name if named else model
        lm = build(cfg, "lm")
    lm.description = OmegaConf.to_container(cfg.lm, resolve=True)
    return lm


def as_setting(value: Any) -> Any:
    """Return a dtype or a device of torch as conf/ names it; other values unchanged."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value


@check_call
def pair_lms(base: LanguageModel, tuned: LanguageModel, spliced: str = "tuned", device: str = "auto") -> PairedLM:
    """Run two language models on the same tokens, for a crosscoder: sources are the sites of `base`, then of `tuned`.

    Arguments and errors are those of PairedLM.
    """
    lm = PairedLM(base, tuned, spliced, device)  # type: ignore[arg-type]
    name = f"{PairedLM.__module__}.{PairedLM.__qualname__}"
    of_pair = {"base": base.description, "tuned": tuned.description}
    lm.description = {"_target_": name, "spliced": spliced, "device": device, **of_pair}
    return lm
