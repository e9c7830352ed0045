"""Sizes are counted of what has no numbers, and are those of what has."""

import pytest
import torch
from conftest import SAE_NAMES, compose, dictionary

from sae_lab.ops.sparse import SparseCode
from sae_lab.planning.plan import known_models
from sae_lab.planning.sizes import LMSize, counted, depth_of, lm_size, read_sizes, sae_size
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import UserError

SITES = "lm.sites=[transformer.h.1,transformer.h.3]"
KINDS = {name: [f"sae={name}", *([SITES] if name == "route" else [])] for name in SAE_NAMES} | {
    "crosscoder": [SITES],
    "transcoder": ["experiment=transcoder", "sae.skip=true"],
    "cross_layer": ["experiment=cross_layer", "n_latents=384"],
    "tied": ["sae=topk", "sae.tied=true"],
    "frozen": ["sae=topk", "sae.frozen_decoder=true"],
    "mlp": ["sae.hidden=[8]"],
}


def planned(*overrides: str):
    return compose("machine=cpu2", "expansion=2", *overrides, config_name="plan")


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_without_numbers_has_the_sizes_of_one_with(kind):
    cfg = planned(*KINDS[kind])
    reading = read_sizes(cfg, known_models())
    size = sae_size(cfg, reading)
    f = int(cfg.n_latents or 256)
    sae = build(cfg, "sae", d_in=128, n_latents=f, n_sources=reading.n_sources)
    trained = [p for p in sae.parameters() if p.requires_grad]
    assert size.parameters == sum(p.numel() for p in trained)
    assert size.buffers == sum(b.numel() * b.element_size() for b in sae.buffers())
    rows = torch.randn(4, reading.n_sources * (1 + sae.reads_previous), 128)
    with torch.no_grad():
        assert size.sparse == isinstance(sae.train()(rows).code, SparseCode)
    assert (size.n_latents, size.width) == (f, 128 * reading.n_sources)
    assert size.by_latent == sum(p.numel() for p in trained if len(p) == f)
    explains = getattr(dictionary(sae), "auxk_coefficient", 0) > 0
    assert size.k_aux == explains * dictionary(sae).sources.n_written * 64


def test_a_dictionary_larger_than_the_memory_is_counted():
    size = sae_size(
        planned("n_latents=10_000_000", "expansion=null"), read_sizes(planned(), known_models())._replace(n_sources=64)
    )
    assert size.parameters == 2 * 10_000_000 * 64 * 128 + 64 * 128
    shard = size.shard(8)
    assert (shard.parameters, shard.n_latents) == (2 * 1_250_000 * 64 * 128 + 64 * 128, 1_250_000)


@pytest.mark.parametrize(("name", "config"), [("gpt2", "GPT2Config"), ("google/gemma-2-2b", "Gemma2Config")])
def test_the_table_has_what_transformers_counts(name, config, tmp_path):
    import transformers

    getattr(transformers, config)().save_pretrained(tmp_path)
    assert counted(str(tmp_path)) == known_models()[name]


def test_a_model_is_counted_by_its_config_alone():
    assert counted("tiny") == known_models()["tiny"]
    assert counted("no/such") == {}


def test_an_unknown_model_needs_its_sizes():
    with pytest.raises(UserError, match=r"lm\.name=no/such is not on this machine.*give lm_size\.d=\.\.\. lm_size"):
        lm_size("no/such", {}, known_models())
    given = {"d": 8, "n_layers": 2, "parameters": 100, "embedding": 10, "vocab_size": 5}
    assert lm_size("no/such", given, {}) == LMSize(8, 2, 100, 10, 5)
    assert lm_size("gpt2", {"n_layers": 3}, known_models()).n_layers == 3


@pytest.mark.parametrize(
    ("site", "depth"),
    [
        ("transformer.h.2", 3),
        ("model.layers.15.input", 15),
        ("blocks.8.hook_resid_pre", 8),
        ("blocks.8.hook_resid_post", 9),
        ("blocks.3.mlp.hook_in", 3.5),
        ("lm_head.input", 24),
    ],
)
def test_a_site_says_how_many_blocks_run(site, depth):
    assert depth_of(site, 24) == depth


def test_two_models_and_their_sites_are_read():
    two = ["lm=paired", "lm.base.name=tiny", "lm.tuned.name=tiny", "lm.base.sites=[transformer.h.1]"]
    reading = read_sizes(planned(*two), known_models())
    assert (reading.n_sources, reading.n_models, reading.n_layers) == (2, 2, 2)
