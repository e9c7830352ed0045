"""Generation token by token, and with the code of an SAE edited on the way."""

import pytest
import torch
from conftest import build, compose

from sae_lab.evaluation.downstream import with_edit
from sae_lab.lm.generation import generate
from sae_lab.runtime.build import build as build_node


@pytest.fixture(scope="module")
def lm():
    return build_node(compose("lm=tiny", "lm.device=cpu"), "lm")


@pytest.fixture(scope="module")
def prompt(lm):
    return torch.tensor([[lm.bos_id, *lm.tokenizer("import os")["input_ids"]]])


def test_greedy_generation_is_that_of_transformers(lm, prompt):
    theirs = lm.model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(lm.predictions, prompt, 6), theirs)


def test_sampling_repeats_with_its_seed_and_rows_differ(lm, prompt):
    rows = prompt.repeat(3, 1)
    drawn = [generate(lm.predictions, rows, 6, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique(dim=0)) > 1


def test_a_row_longer_than_the_context_sees_its_last_tokens(lm, prompt):
    short = generate(lm.predictions, prompt, 2, context=1)
    assert torch.equal(short[:, -2:], generate(lm.predictions, prompt[:, -1:], 2, context=1)[:, 1:])


def test_an_edit_adds_what_it_changes_of_x_hat(lm, prompt):
    sae = build("topk", "sae.normalize=none", d_in=lm.d).eval()
    unit = torch.zeros(sae.n_latents).index_fill(0, torch.tensor([3]), 1.0)
    added = with_edit(lm, sae, lambda z: z + 5 * unit)(prompt).logits()
    clean = lm.activations(prompt)
    by_hand = lm.logits(prompt, replace=clean + 5 * sae.directions()[3])
    torch.testing.assert_close(added, by_hand, rtol=0, atol=1e-4)
    assert not torch.allclose(added, lm.logits(prompt), atol=1e-2)


def test_no_edit_changes_nothing_and_nothing_changes_where_nothing_is_kept(lm, prompt):
    sae = build("topk", d_in=lm.d).eval()
    for edit, keep in ((None, None), (lambda z: 9 * z, lambda tokens, _: torch.zeros(tokens.shape, dtype=torch.bool))):
        same = with_edit(lm, sae, edit, keep)(prompt).logits()
        torch.testing.assert_close(same, lm.logits(prompt), rtol=0, atol=1e-5)


def test_x_hat_takes_the_place_of_the_activation_without_the_error(lm, prompt):
    sae = build("topk", d_in=lm.d).eval()
    spliced = with_edit(lm, sae, None, keep_error=False)(prompt).logits()
    x = lm.activations(prompt)
    by_hand = lm.logits(prompt, replace=sae.reconstruct(x.flatten(0, 1)).view_as(x))
    torch.testing.assert_close(spliced, by_hand, rtol=0, atol=1e-4)
