"""Write sae_lab/interop/releases.yaml from the table of releases of an installed sae-lens (data only, no code of it).

Run with `pip install --no-deps sae-lens`:  python tests/interop/write_releases.py pretrained_saes.yaml VERSION DATE
"""

import re
import sys
from itertools import groupby, product
from pathlib import Path
from typing import Any

import yaml

FORMATS = {
    None: "sae_lens", "gemma_2": "gemma_scope", "gemma_2_transcoder": "gemma_scope", "gemma_3": "gemma_scope_2",
    "dictionary_learning_1": "dictionary_learning", "qwen_scope": "qwen_scope", "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1", "mwhanna_transcoder": "circuit_tracer",
    "mntss_clt_layer_transcoder": "circuit_tracer", "goodfire": "linear_layers", "deepseek_r1": "linear_layers",
    "connor_rob_hook_z": "matrices", "temporal": "temporal",
}  # fmt: skip
WIDTHS = {  # residual stream; heads joined
    "gemma-3-270m": (640, 1024), "gemma-3-1b": (1152, 1024), "gemma-3-4b": (2560, 2048), "gemma-3-12b": (3840, 4096),
    "gemma-3-27b": (5376, 4096), "gemma-2-2b": (2304, 2048), "gemma-2-9b": (3584, 4096), "gemma-2-27b": (4608, 4096),
    "gemma-2b": (2048, 2048), "gpt2-small": (768, 768), "pythia-70m": (512, 512), "llama-3.3-70b": (8192, 8192),
    "llama": (4096, 4096), "mistral-7b": (4096, 4096), "qwen2.5-7b": (3584, 3584), "gpt-oss-20b": (2880, 4096),
    "qwen3-0.6b": (1024, 2048), "qwen3-1.7b": (2048, 2048), "qwen3-4b": (2560, 4096), "qwen3-8b": (4096, 4096),
    "qwen3-14b": (5120, 5120), "qwen3-30b": (2048, 4096), "qwen3.5-2b": (2048, 2048), "qwen3.5-9b": (4096, 4096),
    "qwen3.5-27b": (5120, 5120), "qwen3.5-35b": (2048, 2048),
}  # fmt: skip
LATENTS = [
    (r"v5-128k", 131072), (r"v5-32k", 32768), (r"^gpt2-small-(res-jb|mlp-tm|hook-z-kk)$", 24576),
    (r"^llama_scope.*_32x", 131072), (r"^llama_scope", 32768), (r"^pythia-70m", 32768), (r"^goodfire", 65536),
    (r"^deepseek", 65536), (r"^gemma-2b", 16384), (r"matryoshka-dc", 32768), (r"andyrdt", 131072),
]  # fmt: skip
SITES = [  # (release, site with {} for the layer)
    (r"gemma-scope-2-.*transcoders", "model.layers.{}.pre_feedforward_layernorm > "
                                     "model.layers.{}.post_feedforward_layernorm"),
    (r"gemma-scope-2-.*-res", "model.layers.{}"),
    (r"gemma-scope-2-.*-mlp", "model.layers.{}.post_feedforward_layernorm"),
    (r"gemma-scope-2-.*-att", "model.layers.{}.self_attn.o_proj (input)"),
    (r"gemma-scope.*transcoders", "blocks.{}.ln2.hook_normalized > blocks.{}.hook_mlp_out"),
    (r"gemma-scope.*-mlp|llama_scope_lxm", "blocks.{}.hook_mlp_out"), (r"gemma-scope.*-att", "blocks.{}.attn.hook_z"),
    (r"llama_scope_lxa", "blocks.{}.hook_attn_out"), (r"hook-z-kk", "blocks.{}.attn.hook_z"),
    (r"mwhanna|mntss", "blocks.{}.mlp.hook_in > blocks.{}.hook_mlp_out"), (r"", "blocks.{}.hook_resid_post"),
]  # fmt: skip


def tokens(text: str) -> list[str]:
    """Split a name into words that may vary: numbers with a unit, and the words between separators."""
    return [t for t in re.split(r"(\d+[kmx]?(?![A-Za-z0-9.]*\d*\.v)|[A-Za-z]+|[^A-Za-z0-9])", text) if t]


def ranges(values: tuple[str, ...]) -> str:
    """Return one choice of a pattern: {0..25}, {16k,65k}, or the only value."""
    if len(values) == 1:
        return values[0]
    if all(v.isdigit() for v in values) and [str(int(values[0]) + i) for i in range(len(values))] == list(values):
        return "{" + f"{values[0]}..{values[-1]}" + "}"
    return "{" + ",".join(values) + "}"


def merge(ids: list[str]) -> list[list[tuple[str, ...]]]:
    """Merge ids of one number of words into products of choices."""
    items = [[(t,) for t in tokens(name)] for name in ids]
    for p in reversed(range(len(items[0]))):
        rest: dict[Any, list[str]] = {}
        for item in items:
            rest.setdefault((tuple(item[:p]), tuple(item[p + 1 :])), []).extend(item[p])
        order = lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0)  # noqa: E731
        items = [[*a, tuple(sorted(dict.fromkeys(v), key=order)), *b] for (a, b), v in rest.items()]
    return items


def path_template(choices: list[tuple[str, ...]], names: list[str], paths: list[str]) -> str | None:
    """Return the paths as one template: {0} is the id, {1} its first choice, [...] one value for each id."""
    for prefix in {p[: len(p) - len(n)] for p, n in zip(paths, names, strict=True) if p.endswith(n)}:
        if all(p == prefix + n for p, n in zip(paths, names, strict=True)):
            return None if prefix == "" else prefix + "{0}"
    words = [tokens(p) for p in paths]
    if len({len(w) for w in words}) > 1:
        raise ValueError(paths)
    out = ""
    for column in zip(*words, strict=True):
        if len(set(column)) == 1:
            out += column[0]
            continue
        same = [i for i, c in enumerate(zip(*choices, strict=True), 1) if c == column]
        out += "{" + str(same[0]) + "}" if same else "[" + " ".join(column) + "]"
    return out


def patterns(pairs: dict[str, str]) -> list[Any]:
    key = lambda pair: (len(tokens(pair[0])), len(tokens(pair[1])))  # noqa: E731
    out: list[Any] = []
    for _, group in groupby(sorted(pairs.items(), key=key), key):
        for item in merge([name for name, _ in group]):
            varying = [v for v in item if len(v) > 1]
            names = ["".join(x) for x in product(*item)]
            choices = list(product(*varying))
            template = path_template(choices, names, [pairs[n] for n in names])
            pattern = "".join(map(ranges, item))
            out.append(pattern if template is None else {pattern: template})
    return out


def describe(name: str, release: dict[str, Any]) -> dict[str, Any]:
    format = FORMATS[release["conversion_func"]]
    site = next(site for pattern, site in SITES if re.search(pattern, name))
    model = release["model"].lower()
    width = next((w for key, w in sorted(WIDTHS.items(), key=lambda x: -len(x[0])) if key in model), (None, None))
    out = {"repo": release["repo_id"], "format": format, "model": release["model"], "site": site}
    out["d"] = width["hook_z" in site or "o_proj" in site]
    for pattern, latents in LATENTS:
        if re.search(pattern, name):
            out["latents"] = latents
            break
    if match := re.search(r"W(\d+)K-L0_(\d+)$", release["repo_id"]):
        out |= {"latents": 1024 * int(match[1]), "k": int(match[2])}
    if match := re.search(r"width-2pow(\d+)", name):
        out["latents"] = 2 ** int(match[1])
    if release["conversion_func"] == "gemma_2_transcoder":
        out["transcoder"] = True
    overrides = {k: v for k, v in (release.get("config_overrides") or {}).items()
                 if k in ("normalize_activations", "model_from_pretrained_kwargs")}  # fmt: skip
    if overrides:
        out["overrides"] = overrides
    if format == "sae_lens":
        scales = {s["id"]: s["norm_scaling_factor"] for s in release["saes"] if "norm_scaling_factor" in s}
        if scales:
            out["scale"] = scales
    pairs = {s["id"]: str(s["path"]) for s in release["saes"]}
    if release["conversion_func"] == "mntss_clt_layer_transcoder":
        pairs = {name: f"W_enc_{layer}.safetensors" for name, layer in pairs.items()}
    return {key: value for key, value in out.items() if value is not None} | {"saes": patterns(pairs)}


HEADER = """\
# Published SAEs by name of release: where they are on the Hugging Face hub, and what reads them.
#
# Names, repositories, paths and widths are those of the table of SAELens {version} ({date}), compressed into patterns
# by tests/interop/write_releases.py. Sites, widths d and numbers of latents are those of the models and model cards.
#
#   repo     repository on the hub             format   module of sae_lab/interop that reads the files
#   site     where the activations are, {{}} for the layer; `a > b`: a transcoder that reads a and predicts b
#   d, latents     widths, where known         k, scale, overrides, transcoder     what the files themselves do not say
#   saes     ids, each with its path in the repository: the same, or `id: path`. {{a,b}} and {{0..9}} in an id are
#            choices; in a path {{0}} is the id, {{1}} its first choice, and [a b] has one value for each id.

"""


class Compact(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def main(table: str, version: str, date: str) -> None:
    releases = yaml.load(Path(table).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    described = {name: describe(name, release) for name, release in sorted(releases.items())}
    settings = {"sort_keys": False, "width": 118, "allow_unicode": True, "default_flow_style": None}
    text = "\n".join(yaml.dump({k: v}, Dumper=Compact, **settings) for k, v in described.items())
    out = Path(__file__).parents[2] / "sae_lab" / "interop" / "releases.yaml"
    out.write_text(HEADER.format(version=version, date=date) + text)


if __name__ == "__main__":
    main(*sys.argv[1:])
