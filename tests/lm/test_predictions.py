"""Logits by slices are those of a whole forward pass, whatever follows a model's output embedding."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from sae_lab.lm import TransformersLM
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.finding import TINY
from sae_lab.lm.paired import PairedLM
from sae_lab.lm.predictions import PredictionsOfHidden, PredictionsOfRows, cut
from sae_lab.lm.sites import find_blocks

V = 96
COMMON = {
    **{"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "max_position_embeddings": 64,
}
SMALL = COMMON | {"num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {  # what stands between the hidden states and the logits
    "Gemma2Config": SMALL | {"head_dim": 8, "final_logit_softcapping": 0.5},
    "CohereConfig": SMALL | {"logit_scale": 0.3},
    "GraniteConfig": SMALL | {"logits_scaling": 4.0},
    "PhiConfig": COMMON | {"pad_token_id": 0},  # a bias
    "GPT2Config": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "LlamaConfig": SMALL,
    "GPTNeoXConfig": COMMON,
    "OPTConfig": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 1},  # the body is model.decoder
}
TOKENS = torch.randint(0, V, (5, 12), generator=torch.Generator().manual_seed(0))


class Unsaved(TransformersLM):
    """A model of random weights, never saved."""

    def __init__(self, config, sites=None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=0)
        LanguageModel.__init__(self, "unsaved", sites or find_blocks(model)[:1], model, config, tokenizer, 0)


def assert_slices_are_the_whole(lm, tokens, kind) -> None:
    x = lm.activations(tokens)
    where = torch.rand(x.shape[:3], generator=torch.Generator().manual_seed(0)) > 0.4
    whole = lm.logits(tokens, 0.3 * x, where)
    assert (whole - lm.logits(tokens)).abs().max() > 1e-2
    predictions = lm.predictions(tokens, 0.3 * x, where)
    assert type(predictions) is kind
    assert torch.equal(predictions.logits(), whole)
    for size in (1, 5, 30):
        for piece in cut(*tokens.shape, size):
            torch.testing.assert_close(predictions.logits(*piece), whole[piece], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_are_the_whole(name):
    assert_slices_are_the_whole(Unsaved(getattr(transformers, name)(**CONFIGS[name])), TOKENS, PredictionsOfHidden)


def test_the_body_runs_once():
    lm = Unsaved(transformers.LlamaConfig(**SMALL))
    assert lm.is_split
    rows = []
    lm.model.model.layers[0].register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    predictions = lm.predictions(TOKENS)
    for piece in cut(5, 12, 4):
        predictions.logits(*piece)
    assert rows == [5]
    assert torch.equal(lm.logits(TOKENS), predictions.logits())  # the model is whole again


def test_a_site_behind_the_body_is_replaced_all_the_same():
    lm = Unsaved(transformers.LlamaConfig(**SMALL), ["lm_head.input"])
    assert_slices_are_the_whole(lm, TOKENS, PredictionsOfRows)


def test_a_pair_predicts_with_the_model_that_is_named():
    base, tuned = (TransformersLM(TINY, ["transformer.h.2"], device="cpu") for _ in range(2))
    with torch.no_grad():
        tuned.model.transformer.h[4].mlp.c_proj.weight.mul_(0.5)
    for spliced in ("base", "tuned"):
        assert_slices_are_the_whole(PairedLM(base, tuned, spliced, device="cpu"), TOKENS, PredictionsOfHidden)


@pytest.mark.parametrize(("size", "largest", "n"), [(1, 1, 60), (5, 4, 15), (12, 12, 5), (30, 24, 3), (99, 60, 1)])
def test_a_cut_has_every_position_once(size, largest, n):
    counts = torch.zeros(5, 12)
    pieces = cut(5, 12, size)
    for piece in pieces:
        counts[piece] += 1
        assert counts[piece].numel() <= largest
    assert (counts == 1).all()
    assert len(pieces) == n
