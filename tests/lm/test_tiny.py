"""The bundled model is a language model: what its card says, measured again on a part of the held-out text."""

import json

import pytest
import torch
import torch.nn.functional as F

from sae_lab.lm import TransformersLM
from sae_lab.lm.finding import TINY, find_folder
from sae_lab.text.bundled import StdlibDocuments
from sae_lab.text.documents import HELD_OUT
from sae_lab.text.encoding import Encoder
from sae_lab.text.rows import TextRows

SITE = "transformer.h.2"  # the default of conf/lm/tiny.yaml


@pytest.fixture(scope="module")
def lm():
    return TransformersLM(TINY, SITE, device="cpu")


@pytest.fixture(scope="module")
def rows(lm):
    """Held-out text, mixed: its first rows come from all over the split."""
    return TextRows(StdlibDocuments(HELD_OUT), Encoder(lm.tokenizer), 128, lm.bos_id).take(64)


@pytest.fixture(scope="module")
def clean(lm, rows) -> float:
    return cross_entropy(lm, rows)


def cross_entropy(lm, rows, replace=None) -> float:
    with torch.no_grad():
        logits = lm.logits(rows, replace)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_held_out_text_is_predicted_far_better_than_by_word_frequencies(clean):
    card = json.loads((find_folder(TINY) / "figures.json").read_text())
    assert clean <= 0.6 * card["unigram_entropy"]


def test_the_default_site_matters(lm, rows, clean):
    assert cross_entropy(lm, rows, torch.zeros(*rows.shape, 1, lm.d)) - clean >= 1.5
