"""Two language models as one: whose activations stand where, whose logits are meant, what cannot be paired."""

import json

import pandas as pd
import pytest
import torch
from conftest import compose
from hydra.utils import instantiate

from sae_lab.evaluation import diffing
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.lm import PairedLM, TransformersLM
from sae_lab.lm.finding import FINE_TUNED_TINY, TINY
from sae_lab.runs.results import write_results
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import UserError
from sae_lab.training.run import build_sae

SITES = ["transformer.h.2", "transformer.h.0"]


def tuned_lm(sites=SITES) -> TransformersLM:
    """The bundled model with other weights in block 0."""
    lm = TransformersLM(TINY, sites, device="cpu")
    lm.model.transformer.h[0].mlp.c_proj.weight.data *= 1.5
    return lm


@pytest.fixture(scope="module")
def base() -> TransformersLM:
    return TransformersLM(TINY, SITES, device="cpu")


@pytest.fixture(scope="module")
def tuned() -> TransformersLM:
    return tuned_lm()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 4096, (2, 11), generator=torch.Generator().manual_seed(0))


def test_sources_are_the_sites_of_one_model_then_of_the_other(base, tuned, tokens):
    pair = PairedLM(base, tuned, device="cpu")
    x = pair.activations(tokens)
    assert torch.equal(x[:, :, :2], base.activations(tokens))
    assert torch.equal(x[:, :, 2:], tuned.activations(tokens))
    assert pair.sites == (
        "base.transformer.h.2",
        "base.transformer.h.0",
        "tuned.transformer.h.2",
        "tuned.transformer.h.0",
    )
    assert (pair.d, pair.bos_id, pair.context, pair.models) == (128, 0, 256, ("base", "tuned"))


def test_both_models_stop_at_their_last_site(base, tuned, tokens):
    ran = []
    handles = [lm.model.transformer.h[3].register_forward_hook(lambda *_: ran.append(1)) for lm in (base, tuned)]
    PairedLM(base, tuned, device="cpu").activations(tokens)
    for handle in handles:
        handle.remove()
    assert not ran


@pytest.mark.parametrize("spliced", ["base", "tuned"])
def test_logits_are_those_of_the_model_that_is_named(base, tuned, tokens, spliced):
    pair = PairedLM(base, tuned, spliced, device="cpu")
    lm, own = (base, slice(0, 2)) if spliced == "base" else (tuned, slice(2, 4))
    assert torch.equal(pair.logits(tokens), lm.logits(tokens))
    replace = torch.randn(2, 11, 4, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pair.logits(tokens, replace), lm.logits(tokens, replace[:, :, own]))
    where = torch.rand(2, 11, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    assert torch.equal(pair.logits(tokens, replace, where), lm.logits(tokens, replace[:, :, own], where[:, :, own]))
    assert not torch.equal(base.logits(tokens), tuned.logits(tokens))


def test_models_that_do_not_match_are_refused(base):
    with pytest.raises(UserError, match="2 sites of width 128, tiny 1 of 128"):
        PairedLM(base, tuned_lm(SITES[:1]), device="cpu")
    with pytest.raises(UserError, match="spliced=both is not known: choose base or tuned"):
        PairedLM(base, base, "both", device="cpu")


def test_a_site_that_is_not_there_is_named():
    with pytest.raises(Exception, match=r"^lm\.base\.sites: tiny has no site"):
        build(compose("lm=paired", "lm.base.name=tiny", "lm.tuned.name=tiny", "lm.base.sites=[h.2]"), "lm")


def test_the_sibling_says_how_it_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"make it with `python -m sae_lab\.lm\.tiny\.fine_tune`"):
        TransformersLM(FINE_TUNED_TINY, SITES)


def test_the_evaluation_of_a_crosscoder_counts_and_draws_whose_its_latents_are(base, tuned, tmp_path):
    sizes = ["expansion=1", "seq_len=32", "data.n_eval_tokens=512", "data.lm_batch_rows=8", "n_tokens=1024"]
    cfg = compose("experiment=crosscoder_diff", "k=8", *sizes)
    data = instantiate(cfg.data, lm=PairedLM(base, tuned, device="cpu"))
    sae = build_sae(cfg, data)
    assert sae.n_sources == 4
    with torch.no_grad():
        sae.W_dec[:64, 2:] = 0
        sae.after_step()
    evaluation = evaluate(sae.eval(), data)
    metrics, table = evaluation.metrics, evaluation.tables["relative_norm"]
    assert {f"fvu_{i}" for i in range(4)} <= metrics.keys()
    assert (table["relative_norm"][:64] == 0).all()
    assert metrics["latents_base_only"] == (table["density"][:64] > 0).sum() > 0
    assert (
        sum(metrics[f"latents_{name}"] for name in (*diffing.CLASSES, diffing.BETWEEN)) == (table["density"] > 0).sum()
    )
    assert metrics["ce_clean"] == pytest.approx(evaluate(sae, data).metrics["ce_clean"])
    assert tmp_path / "figures" / "relative_norm.png" in write_results(evaluation, sae, tmp_path)
    assert pd.read_csv(tmp_path / "figures" / "relative_norm.csv")["class"].tolist() == table["class"].tolist()
    assert json.loads((tmp_path / "metrics.json").read_text())["n_sources"] == 4
