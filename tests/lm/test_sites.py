"""TransformerLens names in the models of `transformers`: the same places as TransformerLens' own, in every family."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sae_lab.lm import TransformerLensLM, TransformersLM
from sae_lab.lm.finding import TINY, find_folder
from sae_lab.lm.sites import FAMILIES, Place, find_blocks, module_places, transformer_lens_places
from sae_lab.runtime.errors import UserError

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
OWN = {family: {"num_key_value_heads": 1, "head_dim": 16} for family in FAMILIES if not family.startswith("gpt")}
OWN["gpt2"] = {"n_inner": 32}
OWN["gpt_neo"] = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
CASES = [(family, {}) for family in FAMILIES] + [("gpt_neox", {"use_parallel_residual": False})]


def random_model(folder: Path, family: str, **changes) -> str:
    """A model of that architecture, none of whose weights (norms included) is trivial, and the bundled tokenizer."""
    settings = SMALL | OWN.get(family, {}) | changes
    if family == "gpt_neo":
        settings = {
            key: value for key, value in settings.items() if key not in AutoConfig.for_model(family).attribute_map
        }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim > 1 else 0.3, generator=generator)
    model.save_pretrained(folder)
    for path in find_folder(TINY).glob("tokenizer*"):
        shutil.copy(path, folder)
    return str(folder)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_name_means_what_transformer_lens_means(family, changes, tmp_path):
    """Read and replaced; every block, and the embedding."""
    folder = random_model(tmp_path, family, **changes)
    first = TransformersLM(folder, "hook_embed", device="cpu")
    sites = list(first.transformer_lens_places)
    assert len(sites) == 1 + 2 * 7
    ours = TransformersLM(folder, sites, device="cpu")
    lens = TransformerLensLM(folder, sites, device="cpu")
    tokens = torch.randint(0, 4096, (2, 9), generator=torch.Generator().manual_seed(1))
    x = ours.activations(tokens)
    torch.testing.assert_close(x, lens.activations(tokens), atol=1e-5, rtol=1e-5)
    for i, site in enumerate(sites):
        ours.sites = lens.sites = (site,)
        replaced = ours.logits(tokens, -x[:, :, [i]])
        torch.testing.assert_close(replaced, lens.logits(tokens, -x[:, :, [i]]), atol=1e-4, rtol=1e-4)
        assert (replaced - ours.logits(tokens)).abs().max() > 1e-3, site


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2", "qwen3", "gpt2"])
def test_the_bits_of_transformer_lens_where_attention_is_eager(family, tmp_path):
    """GPT-2 differs by rounding: TransformerLens splits the product of queries, keys and values into three."""
    folder = random_model(tmp_path, family)
    sites = [f"blocks.{i}.{hook}" for i in range(2) for hook in ("hook_resid_pre", "hook_resid_post")]
    ours = TransformersLM(folder, sites, device="cpu", load={"attn_implementation": "eager"})
    lens = TransformerLensLM(folder, sites, device="cpu")
    tokens = torch.randint(0, 4096, (8, 40), generator=torch.Generator().manual_seed(1))
    x, expected = ours.activations(tokens), lens.activations(tokens)
    assert torch.equal(x, expected) or (family == "gpt2" and (x - expected).norm() < 1e-6 * expected.norm())


def test_what_is_added_to_the_residual_stream_adds_up(tmp_path):
    """By hand, in Gemma 2: post = pre + attn_out + mlp_out, where both terms come out of a second norm."""
    hooks = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    lm = TransformersLM(random_model(tmp_path, "gemma2"), [f"blocks.1.{hook}" for hook in hooks], device="cpu")
    pre, attn, mlp, post = lm.activations(torch.arange(12).view(2, 6)).unbind(dim=2)
    torch.testing.assert_close(pre + attn + mlp, post)


def test_paths():
    places = transformer_lens_places("gpt_neox", ["gpt_neox.layers.0", "gpt_neox.layers.1"])
    assert places["hook_embed"] == Place("gpt_neox.embed_in", "output")
    assert places["blocks.1.hook_resid_pre"] == Place("gpt_neox.layers.1", "input")
    assert places["blocks.1.hook_resid_post"] == Place("gpt_neox.layers.1", "output")
    assert places["blocks.0.hook_attn_out"] == Place("gpt_neox.layers.0.attention", "output")
    assert places["blocks.0.attn.hook_z"] == Place("gpt_neox.layers.0.attention.dense", "input")
    assert transformer_lens_places("mamba", ["backbone.layers.0"]) == {}


def test_a_module_may_be_called_input_or_output():
    model = nn.ModuleDict({"output": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    places = module_places(model)
    assert places["output"] == places["output.output"] == Place("output", "output")
    assert places["output.input"] == Place("output", "input")
    assert find_blocks(model) == ["layers.0", "layers.1"]


def test_an_unknown_architecture_has_its_own_names_only(tmp_path):
    folder = random_model(tmp_path, "opt", ffn_dim=32, word_embed_proj_dim=32)
    with pytest.raises(UserError, match=r"no site 'blocks.1.hook_resid_pre': .*decoder\.layers\.0 \.\.\.") as e:
        TransformersLM(folder, "blocks.1.hook_resid_pre", device="cpu")
    assert "blocks.i" not in str(e.value)
    assert TransformersLM(folder, "model.decoder.layers.1.input", device="cpu").d == 32
