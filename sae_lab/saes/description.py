"""An SAE in one line, as `repr` shows it."""

import inspect
from typing import Any

import torch

FIRST = ("k", "d_in", "n_latents", "n_sources", "n_inputs", "normalize")
"""Settings that are shown first. The others are shown if they differ from their default."""


def describe(sae: Any) -> str:
    """Return the class, sizes, k, normalization and threshold of an SAE, the settings that differ, its mode and device.

    `BatchTopKSAE(k=8, d_in=64, n_latents=512, normalize='per_token', threshold=0.53; eval, cpu)`
    """
    config, usual = sae.config, defaults(type(sae))
    always = [name for name in FIRST if name in config and (name in ("k", "d_in", "n_latents", "normalize"))]
    shown = {name: config[name] for name in FIRST if name in always or differs(name, config, usual)}
    shown |= {name: show_threshold(tensor) for name, tensor in thresholds(sae).items()}
    shown |= {name: config[name] for name in config if name not in FIRST and differs(name, config, usual)}
    settings = ", ".join(
        f"{name}={value if name in thresholds(sae) else repr(getattr(sae, name))}" for name, value in shown.items()
    )
    device = next(sae.parameters()).device
    return f"{type(sae).__name__}({settings}; {'train' if sae.training else 'eval'}, {device})"


def defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a constructor, including those of its base classes. A subclass's own one counts."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        own = inspect.signature(base.__init__).parameters if "__init__" in vars(base) else {}  # type: ignore[misc]
        found = {name: p.default for name, p in own.items()} | found
    return found


def differs(name: str, config: dict[str, Any], usual: dict[str, Any]) -> bool:
    """Return whether a setting is there and not its default; a list equals a tuple."""
    if name not in config:
        return False
    value, default = (tuple(x) if isinstance(x, list) else x for x in (config[name], usual.get(name)))
    return value != default


def thresholds(sae: Any) -> dict[str, torch.Tensor]:
    """Return what an SAE calls its threshold: one number, or one for each latent."""
    return {name: getattr(sae, name) for name in ("threshold", "thresholds") if hasattr(sae, name)}


def show_threshold(tensor: torch.Tensor) -> str:
    """Return a threshold as text: the number, or the range of several."""
    low, high = tensor.detach().min().item(), tensor.detach().max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g}...{high:.4g}"
