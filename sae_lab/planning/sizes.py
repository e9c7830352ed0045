"""Sizes of a run: of its language model by a config or a table, and of its SAE by its class without numbers."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from sae_lab.lm.finding import find_folder
from sae_lab.lm.loading import dtype_of
from sae_lab.lm.sites import site_names
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import SettingError, settings_under
from sae_lab.saes.base import BaseSAE


class LMSize(NamedTuple):
    """A language model's sizes.

    Args:
        d: width of an activation.
        n_layers: blocks.
        parameters: all of them.
        embedding: those of the embeddings, which no forward pass up to a site multiplies by.
        vocab_size: logits per token.
    """

    d: int
    n_layers: int
    parameters: int
    embedding: int
    vocab_size: int

    def multiplied(self, n_layers: float) -> float:
        """Return the parameters of so many blocks."""
        return (self.parameters - self.embedding) * min(1.0, n_layers / self.n_layers)


class Reading(NamedTuple):
    """What a run reads of its language model.

    Args:
        lm: its sizes.
        n_layers: blocks that run up to the last site.
        n_sources: s.
        itemsize: bytes of a number of an activation.
        n_models: 2 for model diffing.
    """

    lm: LMSize
    n_layers: float
    n_sources: int
    itemsize: int
    n_models: int = 1

    @property
    def bytes_per_token(self) -> int:
        return self.n_sources * self.lm.d * self.itemsize


class SAESize(NamedTuple):
    """An SAE's sizes.

    Args:
        parameters: numbers that are trained.
        by_latent: those with one row per latent, which ranks with other latents do not hold.
        rowwise: those whose gradients never exist as a whole in a captured step.
        buffers: bytes of its state that no optimizer knows.
        n_latents, width: f and the s·d numbers of a row.
        read: the numbers of a row that one latent is computed from.
        written: the w·d numbers of x_hat.
        sparse: whether training has codes by active entry.
        k: active entries of a row.
        shardable: whether ranks may hold different latents.
        name: its class.
        k_aux: the most dead latents that the auxiliary loss chooses by row; 0: none.
    """

    parameters: int
    by_latent: int
    rowwise: int
    buffers: int
    n_latents: int
    width: int
    read: int
    written: int
    sparse: bool
    k: float
    shardable: bool = True
    name: str = "SAE"
    k_aux: int = 0

    def shard(self, m: int) -> "SAESize":
        """Return the sizes of one of m shards of the latents, of which k/m are active on a row on average."""
        own = self.by_latent // m
        return self._replace(
            parameters=self.parameters - self.by_latent + own,
            by_latent=own,
            rowwise=self.rowwise // m,
            buffers=self.buffers // m,
            n_latents=self.n_latents // m,
            k=self.k / m,
        )


def read_sizes(cfg: DictConfig, known: Mapping[str, Mapping[str, int]]) -> Reading:
    """Return the sizes of the language model of a config.

    Args:
        cfg: a run's config, and `lm_size`, whose numbers take precedence.
        known: sizes of models by name, for those whose config is not on this machine.

    Raises:
        SettingError: they are not known, or there is no language model.
    """
    models = [*models_of(cfg).values()]
    lm = lm_size(str(models[-1].get("name")), {k: v for k, v in cfg.lm_size.items() if v is not None}, known)
    sites = site_names(models[-1].get("sites"))
    with settings_under([*models_of(cfg)][-1]):
        itemsize = dtype_of(str(models[-1].get("dtype", "float32"))).itemsize
    for site in sites:
        if (block_of(site) or 0) >= lm.n_layers:
            raise SettingError(
                f"lm.sites has {site}, but the blocks of {models[-1].get('name')} are 0 to {lm.n_layers - 1}: "
                "choose another site."
            )
    depth = max(depth_of(site, lm.n_layers) for site in sites)
    return Reading(lm, depth, len(models) * len(sites), itemsize, len(models))


def models_of(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the parts of a config that name a language model, by their keys: two for model diffing."""
    return {f"lm.{name}": cfg.lm[name] for name in ("base", "tuned") if name in cfg.lm} or {"lm": cfg.lm}


def lm_size(name: str, given: Mapping[str, Any], known: Mapping[str, Mapping[str, int]]) -> LMSize:
    """Return the sizes of a model by its name; see read_sizes."""
    found = dict(known.get(name, {}))
    if not found and not {*LMSize._fields} <= {*given}:
        found = counted(name)
    found |= given
    if missing := [field for field in LMSize._fields if field not in found]:
        keys = " ".join(f"lm_size.{field}=..." for field in missing)
        raise SettingError(
            f"lm.name={name} is not on this machine, and plan knows no sizes of it (only of {', '.join(known)}): "
            f"give {keys}"
        )
    return LMSize(**{field: int(found[field]) for field in LMSize._fields})


def counted(name: str) -> dict[str, int]:
    """Count a model's parameters by its config on this machine, without its weights; {} if it is not there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(find_folder(name) or name), local_files_only=True)
    except (OSError, ValueError):  # not here, or of an architecture that transformers does not know
        return {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs
    positions = [p.numel() for n, p in model.named_parameters() if n.endswith(("wpe.weight", "embed_positions.weight"))]
    embedding = inputs.numel() + (0 if tied else outputs.weight.numel()) + sum(positions)
    return {
        "d": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding": embedding,
        "vocab_size": text.vocab_size,
    }


BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)(.*)")
"""The number of a block in the name of a site: the first one."""


def block_of(site: str) -> int | None:
    """Return the number of a site's block; None if its name has none."""
    found = BLOCK.search(site)
    return int(found[1]) if found else None


def depth_of(site: str, n_layers: int) -> float:
    """Return how many blocks run up to a site: by the number of its block, or all."""
    found = BLOCK.search(site)
    if not found:
        return n_layers
    first, rest = int(found[1]), found[2]
    return first + (0.0 if rest in ("input", "hook_resid_pre") else 1.0 if rest in ("", "hook_resid_post") else 0.5)


def sae_size(cfg: DictConfig, reading: Reading) -> SAESize:
    """Count the SAE of a config, from its class, built without numbers."""
    d, s = reading.lm.d, reading.n_sources
    with torch.device("meta"):
        return size_of(build(cfg, "sae", d_in=d, n_latents=int(cfg.n_latents or cfg.expansion * d), n_sources=s), cfg.k)


def size_of(sae: BaseSAE, k: float) -> SAESize:
    """Count a whole SAE with k active entries on a row."""
    d, s, n_latents = sae.d_in, sae.n_sources, sae.n_latents
    trained = [p for p in sae.parameters() if p.requires_grad]
    rowwise = sum(p.numel() for p in getattr(sae, "row_parameters", dict)())
    rows = sae.reading_directions()
    return SAESize(
        sum(p.numel() for p in trained),
        sum(p.numel() for p in trained if len(p) == n_latents),
        rowwise,
        sum(b.numel() * b.itemsize for b in sae.buffers()),
        n_latents,
        s * d,
        s * d if rows is None else rows[0].numel(),
        (s - sae.n_inputs) * d,
        sae.sparse_codes,
        float(k),
        "shardable" in vars(type(sae)),
        type(sae).__name__,
        most_chosen_dead(sae),
    )


def most_chosen_dead(sae: BaseSAE) -> int:
    """Return how many dead latents the auxiliary loss of an SAE chooses on each row at most; 0: none by row."""
    by_row = (part for part in sae.modules() if getattr(part, "auxk_selection", None) == "row")  # a route's is inside
    most = (getattr(part, "most_explaining", 0) for part in by_row if getattr(part, "auxk_coefficient", 0))
    return min(sae.n_latents, max(most, default=0))
