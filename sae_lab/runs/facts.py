"""What a figure says of the runs that it shows: language model, sites, tokens, seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lab.runs.config import config_file, read_config, read_environment_keys
from sae_lab.runtime.plain_text import short_count
from sae_lab.runtime.private import public


def facts_of(config: DictConfig, from_environment: Sequence[str] = ()) -> dict[str, str]:
    """Return the facts of one run, as text that may leave the machine."""
    said: Any = public(OmegaConf.to_container(config, resolve=True), from_environment)
    lm = said.get("lm") or {}
    sites = lm.get("sites") or []
    sites = [sites] if isinstance(sites, str) else sites
    facts = {"lm": lm.get("name"), "sites": ", ".join(map(str, sites)) if len(sites) < 4 else f"{len(sites)} sites"}
    if isinstance(tokens := said.get("n_tokens"), int):
        facts["tokens"] = f"{short_count(tokens)} tokens" if tokens >= 1e5 else f"{tokens:,} tokens"
    facts["seed"] = f"seed {said['seed']}" if "seed" in said else None
    return {name: str(fact) for name, fact in facts.items() if fact}


def shared_facts(folders: Sequence[Path]) -> str:
    """Return what the runs in some folders have in common, on one line; empty for what is no run folder."""
    known = [facts_of(read_config(f), read_environment_keys(f)) for f in folders if config_file(f).is_file()]
    first = known[0] if known else {}
    return "   ".join(fact for name, fact in first.items() if all(facts.get(name) == fact for facts in known))
