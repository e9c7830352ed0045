"""`loss=kl_mse`: its gradient against a dense reference, exact resume, groups, and what it cannot be combined with."""

import json
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import build, compose
from groups import assert_same_run, config, stop_at_batch, train_each
from transformers import AutoModelForCausalLM, LlamaConfig

from sae_lab.activations.text_batches import TextBatch, TextBatches
from sae_lab.lm import TransformersLM, predictions
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import SafeStop, UserError
from sae_lab.sweeps.shared_stream import train_jobs
from sae_lab.training.job import read_job
from sae_lab.training.run import train_run
from sae_lab.training.splice_loss import SpliceLoss
from sae_lab.training.step import TrainingStep

V, D = 96, 16
SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
TOKENS = torch.randint(1, V, (5, 12), generator=torch.Generator().manual_seed(0))
KEEP = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1)) > 0.25


class Unsaved(TransformersLM):
    """A model of random weights in float64, never saved."""

    def __init__(self, sites):
        torch.manual_seed(0)
        sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
        llama = LlamaConfig(**sizes, **heads)
        model = AutoModelForCausalLM.from_config(llama)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=0)
        LanguageModel.__init__(self, "unsaved", sites, model.double(), llama, tokenizer, 0)


def batch_of(lm) -> TextBatch:
    return TextBatch(TOKENS, KEEP, lm.activations(TOKENS)[KEEP])


def reference(lm, sae, batch: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The term and the KL divergence, from logits as a whole and autograd through all of it."""
    activations, where = lm.activations(TOKENS), KEEP.unsqueeze(-1).repeat(1, 1, len(lm.sites))
    mse = sae.losses(sae(batch.x))["reconstruction"].detach()
    if (predicted := sae.predicted_mask(batch.x)) is not None:
        where[KEEP] = predicted
    activations[KEEP] = sae.autoencode(batch.x)[0]
    clean, spliced = (
        logits[:, :-1].log_softmax(-1) for logits in (lm.logits(TOKENS), lm.logits(TOKENS, activations, where))
    )
    kl = F.kl_div(spliced, clean, log_target=True, reduction="sum") / clean[..., 0].numel()
    return mse / kl.detach() * kl, kl.detach()


def gradients(sae) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    return found


def assert_exact(lm, sae, batch, rows_per_pass: int = 2) -> None:
    """The term, the KL divergence and the gradient. (Log-probabilities are float32 in any model.)"""
    sae = sae.double().train()
    sae(batch.x)  # the first batch sets scales and thresholds
    expected, kl = reference(lm, sae, batch)
    expected.backward()
    wanted = gradients(sae)
    mse = sae.losses(sae(batch.x))["reconstruction"]
    found = SpliceLoss(lm, rows_per_pass)(sae, mse, batch)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-5, atol=0)
    found.term.backward()
    own = gradients(sae)
    assert own.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (own[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name
    assert any(gradient.norm() > 0 for gradient in wanted.values())
    assert all(p.grad is None for p in lm.model.parameters())


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of five positions, so that a row takes several."""
    monkeypatch.setattr(predictions, "SLICE_BYTES", 5 * 4 * V)


def test_the_gradient_of_every_sae_is_that_of_the_dense_computation(sae_name, small_slices):
    lm = Unsaved(SITES if sae_name == "route" else SITES[:1])
    sae = build(sae_name, n_sources=len(lm.sites))
    if sae.reads_previous:
        pytest.skip("its batches are pairs, not whole rows")
    assert_exact(lm, sae, batch_of(lm))


@pytest.mark.parametrize("is_split", [True, False], ids=["hidden_states", "whole_rows"])
@pytest.mark.parametrize(
    "sites", [SITES, ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]], ids=["crosscoder", "transcoder"]
)
def test_the_gradient_of_several_sites(sites, is_split, small_slices):
    lm = Unsaved(sites)
    lm.is_split = is_split
    n_inputs = ["sae.n_inputs=1"] if "mlp" in sites[0] else []
    sae = build("batch_topk", "sae.normalize=mean_norm", "sae.encoder_bias=true", *n_inputs, n_sources=2)
    assert_exact(lm, sae, batch_of(lm))


def test_a_step_minimizes_both_terms_at_equal_size():
    """The step's gradient is the sum of both; the KL divergence falls under it."""
    lm = Unsaved(SITES[:1])
    sae, batch = build("topk").double().train(), batch_of(lm)
    step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2))
    splice = partial(SpliceLoss(lm, 8), batch=batch)
    results = [step(batch.x, splice).detach() for _ in range(30)]
    for result in results:
        assert result.terms["kl"].item() == pytest.approx(result.terms["reconstruction"].item(), rel=1e-5)
    assert results[-1].kl < results[0].kl / 2
    assert results[-1].terms["reconstruction"] < results[0].terms["reconstruction"]


KL = ["loss=kl_mse", "data.exclude_bos=true"]
MEMBERS = {
    "topk": [*KL, "sae=topk"],
    "batch_topk": [*KL, "schedule=warmup_decay"],
    "own_loss": ["data.exclude_bos=true"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train_each(tmp_path_factory.mktemp("alone"), MEMBERS)


def test_a_run_logs_both_terms_and_is_evaluated(alone):
    log = pd.read_csv(alone / "topk" / "metrics.csv")
    assert {"kl", "loss/kl", "loss/reconstruction", "val/fvu"} <= set(log.columns)
    logged = log.dropna(subset="kl")
    assert (logged["kl"] > 0).all()
    assert logged["loss/kl"].to_numpy() == pytest.approx(logged["loss/reconstruction"].to_numpy(), rel=1e-4)
    assert logged["tokens"].iloc[-1] == 12 * 4 * 31  # 12 steps of 4 rows, whose BOS is left out
    assert "ce_degradation" in json.loads((alone / "topk" / "metrics.json").read_text())


def test_a_stopped_run_continues_to_the_same_bits(alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 8, stream=TextBatches)
        with pytest.raises(SafeStop):
            train_run(config(tmp_path / "run", *MEMBERS["batch_topk"]))
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7
    train_run(config(tmp_path / "run", *MEMBERS["batch_topk"]))
    assert_same_run(alone / "batch_topk", tmp_path / "run")


def test_members_of_a_group_are_the_runs_alone(alone, tmp_path):
    train_jobs([read_job(config(tmp_path / name, *overrides)) for name, overrides in MEMBERS.items()])
    for name in MEMBERS:
        assert_same_run(alone / name, tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss=mse"], "loss=mse is not known: choose null or kl_mse"),
        (
            ["loss=kl_mse", "batch_size=16"],
            "batch_size=16 is not a multiple of seq_len=32, but loss=kl_mse takes",
        ),
    ],
)
def test_what_the_loss_cannot_be_combined_with_is_one_sentence(overrides, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        train_run(config(tmp_path / "run", *overrides))
    assert sentence in str(error.value)


def test_activations_without_a_text_are_refused(tmp_path):
    torch.save(torch.randn(4096, 16), tmp_path / "acts.pt")
    overrides = ["loss=kl_mse", "data=tensor", f"data.path={tmp_path / 'acts.pt'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="in no order of a text, which loss=kl_mse needs"):
        train_run(compose(*overrides))
