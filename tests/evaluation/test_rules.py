"""The parameters of one SAE under the rule of another, and an SAE that starts from another."""

import pytest
import torch
from conftest import build, planted

from sae_lab.evaluation.rules import convert_activation
from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes import BatchTopKSAE, JumpReLUSAE, PursuitSAE, TopKSAE, VanillaSAE

X = planted(64)[0] + 0.1


def pre_activations(sae) -> torch.Tensor:
    return sae.pre_activations(sae.sources.normalizer(X)[0]).relu().detach()


def test_a_batch_topk_sae_under_the_row_rule_keeps_the_k_largest_of_each_row():
    sae = build("batch_topk").eval()
    other = convert_activation(sae, "topk")
    h = pre_activations(sae)
    kept = h.topk(4).indices
    torch.testing.assert_close(other.encode(X), torch.zeros_like(h).scatter(1, kept, h.gather(1, kept)))
    assert type(other) is TopKSAE
    assert not other.training


def test_a_topk_sae_under_the_batch_rule_and_under_a_threshold():
    sae = build("topk").eval()
    other = convert_activation(sae, "batch_topk").train()
    h = pre_activations(sae)
    last = h.flatten().topk(4 * 64).values[-1]
    torch.testing.assert_close(other.encode(X), h * (h >= last))
    thresholded = convert_activation(sae, "threshold")
    thresholded.calibrate(X, 0)
    torch.testing.assert_close(thresholded.threshold, last)
    torch.testing.assert_close(thresholded.encode(X), h * (h > last))


def test_signed_codes_keep_their_signs_under_another_rule():
    sae = build("abs_topk").eval()
    h = sae.pre_activations(sae.sources.normalizer(X)[0]).detach()
    other = convert_activation(sae, "threshold")
    other.calibrate(X, 0)
    last = h.abs().flatten().topk(4 * 64).values[-1]
    torch.testing.assert_close(other.threshold, last)
    torch.testing.assert_close(other.encode(X), h * (h.abs() > last))
    assert PursuitSAE.of(sae, "gradient_pursuit").signed


def test_the_running_quantile_gives_way_to_the_batch_rule():
    sae = BatchTopKSAE(k=4, d_in=16, n_latents=64, quantile="running")
    sae(X)
    assert l0_per_row(convert_activation(sae, "batch_topk").train().encode(X)).sum() == 4 * 64


@pytest.mark.parametrize(("name", "lacking"), [("gated", "a k"), ("pursuit", "W_enc")])
def test_a_rule_needs_a_k_and_an_encoder(name, lacking):
    with pytest.raises(UserError, match=f"activation=topk needs {lacking}, and a .*SAE has none"):
        convert_activation(build(name), "topk")


def test_nothing_is_shared_and_settings_are_kept():
    sae = build("matryoshka", "sae.encoder_bias=true", "sae.dead_after=9", "seed=3")
    other = sae.convert_to(TopKSAE, k=2)
    with torch.no_grad():
        other.W_enc.zero_()
    assert sae.W_enc.any()
    assert (other.k, other.encoder_bias, other.dead_after, other.seed) == (2, True, 9, 3)


def test_every_parameter_finds_its_place_or_a_sentence_says_which_does_not():
    vanilla, jumprelu = build("vanilla", "sae.encoder_bias=true"), build("jumprelu")
    with pytest.raises(UserError, match=r"TopKSAE cannot be built from this config: .*'k'"):
        vanilla.convert_to(TopKSAE)
    assert vanilla.convert_to(TopKSAE, k=3).b_enc is not None
    with pytest.raises(UserError, match=r"parameter thresholds \(64,\) of a JumpReLUSAE does not fit this TopKSAE"):
        jumprelu.convert_to(TopKSAE)
    started = build("jumprelu")
    started.start_from(vanilla)
    assert torch.equal(started.W_enc, vanilla.W_enc)
    assert torch.equal(started.thresholds, jumprelu.thresholds)
    assert type(vanilla.convert_to(JumpReLUSAE, penalty="l0")) is JumpReLUSAE


def test_an_sae_that_starts_from_another_of_its_kind_is_that_one():
    sae, new = build("batch_topk"), build("batch_topk", "seed=7")
    for _ in range(3):
        sae(X)
    new.start_from(sae)
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), new.state_dict().values(), strict=True))
    assert torch.equal(new.eval().encode(X), sae.eval().encode(X))


@pytest.mark.parametrize(
    ("sae", "sentence"),
    [
        (lambda: build("topk", n_latents=32), "n_latents=64 cannot start one with n_latents=32: make them equal"),
        (lambda: build("topk", d_in=8), "d_in=16 cannot start one with d_in=8"),
        (lambda: build("topk", "sae.normalize=none"), "need sae.normalize=per_token here as well"),
    ],
)
def test_an_sae_of_another_shape_is_refused(sae, sentence):
    with pytest.raises(UserError, match=sentence):
        sae().start_from(build("topk"))


def test_unknown_rules_and_a_k_that_is_not_whole_are_refused():
    with pytest.raises(UserError, match="activation=relu is not known: choose one of topk, batch_topk, threshold"):
        convert_activation(build("topk"), "relu")
    with pytest.raises(UserError, match=r"k=2.5 must be a whole number here"):
        convert_activation(BatchTopKSAE(k=2.5, d_in=16, n_latents=64), "topk")
    with pytest.raises(UserError, match=r"VanillaSAE|TopKSAE"):
        convert_activation(VanillaSAE(d_in=16, n_latents=64), "topk")
