"""The table of published SAEs, releases.yaml: which repository on the hub has them, and what reads their files."""

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sae_lab.interop.patterns import expand

FILE = Path(__file__).with_name("releases.yaml")
LAYER = re.compile(r"(?:layer_?|blocks\.|^l)(\d+)")
SITE = re.compile(r"blocks\.\d+\.hook_(?:resid_pre|resid_mid|resid_post|mlp_out|attn_out)")
WIDTH = re.compile(r"width_(\d+)([km])")

UNREADABLE = {
    "temporal": "an SAE with attention over a text, whose code of a token depends on the tokens before: every SAE here "
    "encodes a token by itself"
}
"""Formats of releases that have no counterpart here, and why."""


@dataclass(frozen=True)
class Release:
    """One release of the table; the fields are explained at the top of releases.yaml."""

    repo: str
    format: str
    model: str
    site: str
    saes: list[Any]
    d: int | None = None
    latents: int | None = None
    k: int | None = None
    transcoder: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)

    def paths(self) -> dict[str, str]:
        """Return the path in the repository of each SAE, by its id."""
        items = [
            item for entry in self.saes for item in (entry.items() if isinstance(entry, dict) else [(entry, None)])
        ]
        return {name: path for pattern, template in items for name, path in expand(pattern, template)}

    def facts(self, sae_id: str | None) -> dict[str, Any]:
        """Return what the files do not say, as arguments of the reader."""
        known: dict[str, Any] = {"k": self.k, "transcoder": self.transcoder, "overrides": self.overrides}
        known["scale"] = self.scale.get(sae_id or "")
        return {name: value for name, value in known.items() if value}

    def site_of(self, sae_id: str) -> str:
        """Return where the activations of an SAE are."""
        if match := SITE.search(sae_id):
            return match[0]
        if sae_id.startswith("embedding"):
            return "hook_embed"
        layer = LAYER.search(sae_id)
        return self.site.replace("{}", layer[1] if layer else "?")

    def latents_of(self, sae_id: str) -> int | None:
        """Return the number of latents of an SAE if the table or its name says so: width_16k is 2¹⁴."""
        if match := WIDTH.search(sae_id):
            return 2 ** round(math.log2(int(match[1]) * {"k": 1e3, "m": 1e6}[match[2]]))
        return self.latents


@functools.cache
def releases() -> dict[str, Release]:
    """Read the table: the releases by name."""
    table = yaml.load(FILE.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: Release(**entry) for name, entry in table.items()}
