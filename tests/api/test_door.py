"""The rest of the Python door: models, text, search, encoders, composed configs."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build, planted
from torch import nn

from sae_lab import (
    Activations,
    TopKSAE,
    compose,
    compute_metrics,
    evaluate_sae,
    gradient_pursuit,
    load_lm,
    load_sae,
    matching_pursuit,
    orthogonal_matching_pursuit,
    with_encoder,
)
from sae_lab.evaluation.metrics import ReconstructionMetrics, metric, remove_metric
from sae_lab.runtime.errors import UserError
from sae_lab.saes.pursuit_sae import PursuitSAE
from sae_lab.training import progress

SITE = "transformer.h.2"
DOCUMENTS = [f"def f{i}(x):\n    return x + {i}\n" * 6 for i in range(12)]


@pytest.fixture(scope="module")
def lm():
    return load_lm("tiny", SITE, device="cpu")


@pytest.fixture(scope="module")
def tokens(lm):
    return torch.tensor([[lm.bos_id, *lm.tokenizer("def main():")["input_ids"]]])


@pytest.mark.parametrize("pursuit", [matching_pursuit, gradient_pursuit, orthogonal_matching_pursuit])
def test_a_search_is_that_of_the_pursuit_sae(pursuit):
    x, sae = planted(40)[0], build("topk").eval()
    code = pursuit(x, sae, k=4)
    torch.testing.assert_close(code, PursuitSAE.of(sae, pursuit.__name__, 4).encode(x))
    fvu = compute_metrics(x, code, sae.decode(code, x))["fvu"]
    assert fvu < compute_metrics(x, sae.encode(x), sae.reconstruct(x))["fvu"]


def test_a_search_in_plain_rows_keeps_their_units_and_the_axes_of_x():
    x, directions = planted(40)
    rows = 3 * directions[:, 0]
    code = orthogonal_matching_pursuit(x.view(4, 10, 16), rows, k=3)
    assert code.shape == (4, 10, 24)
    assert compute_metrics(x[:, 0], code, code @ rows)["fvu"] < 0.02
    with pytest.raises(UserError, match="k=25 must be a whole number from 1 to the dictionary's 24 rows"):
        gradient_pursuit(x, rows, k=25)


def test_metrics_of_a_tensor_are_those_of_all_its_rows():
    x, sae = planted(100)[0], build("topk").eval()
    totals = ReconstructionMetrics(sae.n_latents)
    totals.update(x, *sae.autoencode(x))
    assert evaluate_sae(sae, x, batch_size=30) == pytest.approx(totals.compute())
    assert evaluate_sae(sae, x.view(10, 10, 16)) == pytest.approx(totals.compute())
    assert not sae.training


def test_metrics_of_a_code_do_not_depend_on_its_form_or_the_axes_of_x():
    x, sae = planted(100)[0], build("topk").eval()
    x_hat, sparse = sae.autoencode(x)
    expected = pytest.approx(compute_metrics(x, sparse.to_dense(), x_hat))
    tokens = x.view(4, 25, 16)
    assert compute_metrics(tokens, sparse, x_hat.view(4, 25, 16)) == expected
    assert compute_metrics(tokens, sparse.to_dense().view(4, 25, -1), x_hat.view(4, 25, 16)) == expected
    assert compute_metrics(x.numpy(), sparse.to_dense().detach().numpy(), x_hat.detach().numpy()) == expected
    assert evaluate_sae(sae, x.numpy()) == evaluate_sae(sae, x)
    two = torch.cat([x, -x], dim=1)  # (b, s, d)
    assert {"fvu_0", "fvu_1"} <= compute_metrics(two, sparse, two).keys()


X, NAN = planted(100)[0], planted(100)[0].index_fill(0, torch.tensor([3]), torch.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: compute_metrics(X, torch.ones(10, 24), X), r"x has shape \(100, 1, 16\), code \(10, 24\)"),
        (lambda lm: compute_metrics(X, torch.ones(100, 24), X[:50]), "must have the same shape"),
        (lambda lm: compute_metrics(X, torch.ones(100, 24), NAN), "x_hat are not finite in 1 of 100 rows"),
        (lambda lm: evaluate_sae(build("topk"), NAN), "x are not finite in 1 of 100 rows"),
        (lambda lm: evaluate_sae(build("topk"), X[:0]), "give at least one row"),
        (lambda lm: evaluate_sae(build("topk"), X, n_evl_tokens=3), "n_evl_tokens has no effect here"),
        (lambda lm: evaluate_sae(build("topk"), Activations.from_tensor(X), n_eval_tokens=64), "n_eval_tokens has no"),
        (lambda lm: evaluate_sae(build("topk"), X, batch_size=0), "batch_size=0 must be a whole number of at least 1"),
        (lambda lm: evaluate_sae(build("topk"), lm, "import sys"), "give a list of strings for text itself"),
        (lambda lm: gradient_pursuit(X, build("topk"), k="4"), "k=4 must be a whole number of at least 1"),
        (lambda lm: with_encoder(build("topk"), hidden=16), "hidden=16 must be a list of whole numbers"),
        (lambda lm: compose(["k=3"]), "overrides=.* must be a list of strings"),
        (lambda lm: load_sae(None), "source=null must be a string or a path"),
        (lambda lm: lm.activations(torch.tensor([1, 2, 3])), r"integers \(n, t\), not torch.int64 of shape \(3,\)"),
        (lambda lm: lm.generate(["a", "b"]), r"prompt=\[a,b\] must be a string"),
        (lambda lm: lm.generate("a", temperature=-1), "temperature=-1 must be a number of at least 0"),
    ],
)
def test_a_wrong_call_is_told_in_one_sentence(call, message, lm):
    with pytest.raises(UserError, match=message):
        call(lm)


def test_a_whole_float_counts_and_a_dtype_may_be_torch_s_own():
    assert torch.equal(gradient_pursuit(X, build("topk"), k=4.0), gradient_pursuit(X, build("topk"), k=np.int64(4)))
    assert load_lm("tiny", SITE, dtype=torch.bfloat16, device=torch.device("cpu")).dtype == torch.bfloat16


def test_a_bad_metric_is_named_and_can_be_removed():
    @metric
    def mine(x, x_hat):
        return 3.0

    with pytest.raises(UserError, match=r"metric mine must return shape \(b, s\) = \(100, 1\), not float: .*'mine'"):
        evaluate_sae(build("topk"), X)
    remove_metric("mine")
    assert "mine" not in evaluate_sae(build("topk"), X)
    with pytest.raises(UserError, match="there is no metric 'nmse' to remove"):
        remove_metric("nmse")


def test_an_encoder_from_scratch_leaves_the_dictionary(monkeypatch):
    sae = build("topk")
    mlp, new = with_encoder(sae, hidden=[8]), with_encoder(sae, hidden=[8, 8], from_scratch=True, seed=5)
    assert torch.equal(mlp.encode(planted(9)[0]), sae.encode(planted(9)[0]))  # the MLP starts at zero
    assert torch.equal(new.W_dec, sae.W_dec)
    assert not torch.equal(new.W_enc, sae.W_enc)
    assert not new.W_dec.requires_grad
    with pytest.raises(UserError, match="has no encoder"):
        with_encoder(build("pursuit"))


def test_text_is_evaluated_whole(lm):
    sae = TopKSAE(k=4, d_in=lm.d, n_latents=64).eval()
    found = evaluate_sae(sae, lm, DOCUMENTS, seq_len=32)
    n = sum(len(lm.tokenizer(text)["input_ids"]) + 1 for text in DOCUMENTS)
    assert n - 32 <= found["n_eval_tokens"] <= n * 33 / 32
    assert found["l0"] == 4
    assert "loss_recovered" in found
    with pytest.raises(UserError, match="needs text"):
        evaluate_sae(sae, lm)


def test_a_module_is_a_language_model_too(lm, tokens):
    same = load_lm(lm.model, SITE, tokenizer=lm.tokenizer, name="mine")
    assert torch.equal(same.activations(tokens), lm.activations(tokens))
    assert (same.name, same.description["name"], same.sites) == ("mine", "mine", (SITE,))
    assert load_lm("tiny", backend="transformers").sites == (SITE,)  # that of conf/lm/tiny.yaml
    with pytest.raises(UserError, match="give tokenizer="):
        load_lm(nn.Linear(2, 2))
    cfg = Activations.from_lm(same, DOCUMENTS).config()
    assert (cfg.lm.name, cfg.lm.sites) == ("mine", [SITE])


def test_inside_spliced_every_pass_has_x_hat(lm, tokens):
    sae = TopKSAE(k=4, d_in=lm.d, n_latents=64).eval()
    x = lm.activations(tokens)
    clean, expected = lm.logits(tokens), lm.logits(tokens, sae.reconstruct(x))
    with lm.spliced(sae):
        assert torch.equal(lm.logits(tokens), expected)
        chosen = lm.tokenizer.decode(expected[0, -1].argmax())
        assert lm.generate("def main():", max_new_tokens=2).startswith(chosen)
    with lm.spliced(sae, lambda z: z, keep_error=True):
        torch.testing.assert_close(lm.logits(tokens), clean, atol=1e-4, rtol=1e-4)
    assert torch.equal(lm.logits(tokens), clean)
    with pytest.raises(UserError, match="takes 1 site of width 16"), lm.spliced(build("topk")):
        pass


def test_a_transcoder_is_spliced_from_what_it_reads(tokens):
    lm = load_lm("tiny", ["transformer.h.2.mlp.input", "transformer.h.2.mlp"], device="cpu")
    sae = TopKSAE(k=4, d_in=lm.d, n_latents=64, n_sources=2, n_inputs=1, normalize="none").eval()
    x = lm.activations(tokens)
    replace = torch.cat([x[:, :, :1], sae.predict(x[:, :, :1])], dim=2)
    with lm.spliced(sae):
        torch.testing.assert_close(lm.logits(tokens), lm.logits(tokens, replace))
    with pytest.raises(UserError, match="predicts 2 sites at once"):
        lm.spliced(TopKSAE(k=4, d_in=lm.d, n_latents=64, n_sources=2))


def test_compose_gives_the_objects_of_a_command_line():
    run = compose("sae=topk", "k=3", "n_latents=64", "lm.sites=[transformer.h.1]", "data.block_tokens=1024")
    assert (run.sae.k, run.sae.n_latents, run.data.lm.sites) == (3, 64, ("transformer.h.1",))
    with pytest.raises(UserError, match="saes=topk cannot be composed"):
        compose("saes=topk")


def test_a_notebook_shows_one_line_that_changes(monkeypatch):
    shown = []
    cell = SimpleNamespace(update=lambda line, raw: shown.append(line["text/plain"]))
    fake = SimpleNamespace(display=lambda line, raw, display_id: cell)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(progress, "BAR_SECONDS", -1)
    monkeypatch.setattr(progress, "console", SimpleNamespace(is_jupyter=True, is_terminal=False))
    callback = progress.TrainingProgress()
    stream = SimpleNamespace(filling=SimpleNamespace(watch=None, seconds=0.0, seconds_per_row=0.0), n_rows_left=9)
    trainer = SimpleNamespace(
        global_step=0, max_steps=2, datamodule=SimpleNamespace(stream=stream), logged_metrics={}, log_every_n_steps=9
    )
    callback.on_train_start(trainer, None)
    for trainer.global_step in (1, 2):
        callback.on_train_batch_end(trainer, None, None, torch.zeros(3, 1, 1), trainer.global_step - 1)
    callback.on_train_end(trainer, None)
    assert [line.split("  ")[0] for line in shown] == ["step 1/2", "step 2/2", "step 2/2"]
