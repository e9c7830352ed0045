"""Site names: module paths, and their TransformerLens names in known architectures."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.runtime.checks import show
from sae_lab.runtime.errors import SettingError


class Place(NamedTuple):
    """Location of a site: a module's input (its first argument) or its output (the first element of a tuple)."""

    module: str
    side: str  # "input" or "output"


# TransformerLens name -> module path, relative to the model's body for embeddings and to a block for the rest.
# A path means the module's output; with `.input` appended, its input. hook_resid_pre is the input of a block and
# hook_resid_post its output. hook_resid_mid is missing on purpose: it is a sum that no module returns. Replacing the
# next module's input instead would leave the residual stream itself unchanged.
GPT2 = {
    "hook_embed": "wte",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "mlp.hook_in": "mlp.input",
    "attn.hook_z": "attn.c_proj.input",
    "mlp.hook_post": "mlp.c_proj.input",
}
GPT_NEO = GPT2 | {"attn.hook_z": "attn.attention.out_proj.input"}
GPT_NEOX = {  # parallel attention and MLP: both read the same residual stream, and each still adds its own term
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
# A second norm follows each sub-layer; the norm's output is what is added to the residual stream.
POST_NORM = LLAMA | {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}

FAMILIES = {  # keyed by `model_type` of the model's config
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

TEXT_MODELS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""`model_type` of the text model in a multimodal checkpoint -> the family whose blocks it has, if the names differ."""


def module_places(model: nn.Module) -> dict[str, Place]:
    """Return the places named `path`, `path.input` and `path.output` for every module path."""
    paths = [path for path, _ in model.named_modules() if path]
    sides = {f"{path}.{side}": Place(path, side) for path in paths for side in ("input", "output")}
    return sides | {path: Place(path, "output") for path in paths}


def transformer_lens_places(model_type: str, blocks: Sequence[str]) -> dict[str, Place]:
    """Return the places that have TransformerLens names, given the paths of the blocks; empty if unknown here."""
    family = FAMILIES.get(TEXT_MODELS.get(model_type, model_type))
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
    """Return the paths of the model's blocks: the elements of the longest `nn.ModuleList` in its text model."""
    inside = text_model_path(model)
    stacks = [(len(m), path) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    stacks = [stack for stack in stacks if stack[1].startswith(inside)]
    if not stacks:
        return []
    depth, stack = max(stacks, key=lambda s: (s[0], -len(s[1])))
    return [f"{stack}.{i}" for i in range(depth)]


def text_model_path(model: nn.Module) -> str:
    """Return the beginning of the paths in the text model; empty for a model that is one, or that does not tell.

    A vision tower may have more blocks than the text model.
    """
    find: Any = getattr(model, "get_decoder", lambda: model)
    decoder = find()
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")


def site_names(sites: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the names in a list of sites, which may also be one name or None."""
    return (sites,) if isinstance(sites, str) else tuple(sites or ())


class UnknownSite(SettingError):
    """A language model has no site of that name."""


def check_sites(name: str, sites: Sequence[str] | str | None, known: Sequence[str], offer: str) -> None:
    """Raise a SettingError unless the sites are known and distinct, and there is one. `offer` ends the message."""
    names = site_names(sites)
    if not names or len(set(names)) < len(names):
        raise SettingError(f"{{sites}}={show(sites)} must name at least one site, and none twice: {offer}")
    for site in names:
        if site not in known:
            close = difflib.get_close_matches(site, known, n=3)
            hint = f"did you mean {' or '.join(close)}? Otherwise " if close else ""
            raise UnknownSite(f"{{sites}}: {name} has no site {site!r}: {hint}{offer}")


def join_heads(site: str, x: Any, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
    """Return a site's activation as one vector per token, with attention heads joined.

    Raises:
        UserError: the activation does not begin with the axes (n, t), or has no further axis.
    """
    if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[:2] != tokens.shape:
        kind = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise SettingError(f"{{sites}}: {site} does not hold one vector per token ({kind}): choose another site.")
    return x.flatten(2)
