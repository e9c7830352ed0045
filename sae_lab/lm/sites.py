"""The names of sites: paths of modules, and TransformerLens names for them in the architectures that it knows."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.runtime.errors import UserError


class Place(NamedTuple):
    """Where a site is: what comes into a module (its first argument), or what leaves it (its first result)."""

    module: str
    side: str  # "input" or "output"


# What TransformerLens calls a place -> its path: from the model's body for embeddings, from a block for the rest.
# A path means the module's output, and its input where `.input` follows. Every block's hook_resid_pre is its input,
# every hook_resid_post its output. hook_resid_mid is missing on purpose: the sum that it names is made between two
# modules, and a replacement at the next module's input would leave the residual stream itself unchanged.
GPT2 = {
    "hook_embed": "wte",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "mlp.hook_in": "mlp.input",
    "attn.hook_z": "attn.c_proj.input",
    "mlp.hook_post": "mlp.c_proj.input",
}
GPT_NEO = GPT2 | {"attn.hook_z": "attn.attention.out_proj.input"}
GPT_NEOX = {  # attention and MLP read the same residual stream and are added together: parallel, but still two terms
    "hook_embed": "embed_in",
    "hook_attn_out": "attention",
    "hook_mlp_out": "mlp",
    "mlp.hook_in": "mlp.input",
    "attn.hook_z": "attention.dense.input",
    "mlp.hook_post": "mlp.dense_4h_to_h.input",
}
LLAMA = {
    "hook_embed": "embed_tokens",
    "hook_attn_out": "self_attn",
    "hook_mlp_out": "mlp",
    "mlp.hook_in": "mlp.input",
    "attn.hook_z": "self_attn.o_proj.input",
    "mlp.hook_post": "mlp.down_proj.input",
}
# A second norm stands between a sub-layer and the residual stream: what is added to the stream is the norm's output.
POST_NORM = LLAMA | {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}

FAMILIES = {  # by `model_type` of the model's config
    "gpt2": GPT2,
    "gpt_neo": GPT_NEO,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
    "gemma": LLAMA,
    "gemma2": POST_NORM,
    "gemma3_text": POST_NORM,
    "olmo2": POST_NORM,
}


def module_places(model: nn.Module) -> dict[str, Place]:
    """`path`, `path.input` and `path.output` of every module."""
    paths = [path for path, _ in model.named_modules() if path]
    sides = {f"{path}.{side}": Place(path, side) for path in paths for side in ("input", "output")}
    return sides | {path: Place(path, "output") for path in paths}


def transformer_lens_places(model_type: str, blocks: Sequence[str]) -> dict[str, Place]:
    """TransformerLens names in a model of a known architecture, whose blocks have these paths; else none."""
    family = FAMILIES.get(model_type)
    if family is None or not blocks:
        return {}
    body = blocks[0].rsplit(".", 2)[0]
    places = {name: _place(f"{body}.{path}") for name, path in family.items() if name.endswith("embed")}
    in_block = {name: path for name, path in family.items() if name not in places}
    for i, block in enumerate(blocks):
        places[f"blocks.{i}.hook_resid_pre"] = Place(block, "input")
        places |= {f"blocks.{i}.{name}": _place(f"{block}.{path}") for name, path in in_block.items()}
        places[f"blocks.{i}.hook_resid_post"] = Place(block, "output")
    return places


def _place(path: str) -> Place:
    module, dot, side = path.rpartition(".")
    return Place(module, side) if dot and side == "input" else Place(path, "output")


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of the model's blocks: the longest list of modules."""
    stacks = [(len(m), path) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        return []
    depth, stack = max(stacks, key=lambda s: (s[0], -len(s[1])))
    return [f"{stack}.{i}" for i in range(depth)]


def check_sites(name: str, sites: Sequence[str], known: Sequence[str], offer: str) -> None:
    """UserError unless the sites are known, at least one and none twice; `offer` is the end of its sentence."""
    if not sites or len(set(sites)) < len(sites):
        raise UserError(f"lm.sites={list(sites)} must name at least one site, and none twice: {offer}")
    for site in sites:
        if site not in known:
            close = difflib.get_close_matches(site, known, n=3)
            hint = f"did you mean {' or '.join(close)}? Otherwise " if close else ""
            raise UserError(f"lm.sites: {name} has no site {site!r}: {hint}{offer}")


def describe_sites(site: str, x: Any, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
    """What a site holds, as one vector a token (attention heads are joined); UserError if it is anything else."""
    if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[:2] != tokens.shape:
        kind = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"lm.sites: {site} does not hold one vector a token ({kind}): choose another site.")
    return x.flatten(2)
