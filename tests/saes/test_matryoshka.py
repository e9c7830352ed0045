"""Matryoshka: nested losses, groups, truncation (docs/pitfalls.md: P-39 to P-41)."""

import pytest
import torch
from conftest import build, planted

from sae_lab.ops.sparse import SparseCode, l0_per_row
from sae_lab.runtime.errors import UserError
from sae_lab.saes.matryoshka import MatryoshkaSAE, MatryoshkaTopKSAE, Nested, doubling_group_sizes
from sae_lab.saes.vanilla import VanillaSAE

SIZES = [4, 12, 16, 32]
X = planted(48, seed=3)[0] + 0.1


class NestedVanilla(Nested, VanillaSAE):
    """Any linear SAE can be nested: one with dense codes."""


def nested(cls=MatryoshkaSAE, **settings) -> Nested:
    k = {} if cls is NestedVanilla else {"k": 4}
    sae = cls(**k, d_in=16, n_latents=64, group_sizes=SIZES, normalize="none", auxk_coefficient=0.0, **settings)
    torch.nn.init.normal_(sae.b_dec, std=0.1, generator=torch.Generator().manual_seed(0))
    return sae


@pytest.mark.parametrize(("bias_level", "expected"), [(False, 1.4275 / 2), (True, 0.960833)])
def test_golden_e(bias_level, expected):
    """The average of the levels (1.4275 where one sums over d = 2), and the authors' code, which counts b_dec too."""
    sae = MatryoshkaSAE(k=1, d_in=2, n_latents=3, group_sizes=[1, 2], include_bias_level=bias_level)
    sae.W_dec.data = torch.tensor([[[1.0, 0]], [[0, 1]], [[0.6, 0.8]]])
    sae.b_dec.data = torch.tensor([[0.1, 0]])
    x, z = torch.tensor([[[1.0, 2]], [[0, 1]]]), torch.tensor([[1, 1, 0.5], [0, 0.5, 0.5]])
    out = sae.output(x, x, z, None)
    errors = [(x - level).square().sum().item() / 2 for level in out.levels]
    assert errors == pytest.approx([2 * 1.455, 2.51, 0.345])
    assert sae.reconstruction(out).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cls", [MatryoshkaSAE, MatryoshkaTopKSAE, NestedVanilla])
@pytest.mark.parametrize("bias_level", [False, True])
def test_loss_and_gradients_are_those_of_decoding_every_prefix(cls, bias_level):
    sae = nested(cls, include_bias_level=bias_level)
    out = sae(X)
    assert isinstance(out.code, SparseCode) == (cls is not NestedVanilla)
    z = out.code.to_dense() if isinstance(out.code, SparseCode) else out.code
    h = (X - sae.b_dec)[:, 0] @ sae.W_enc[:, 0].T
    z = torch.where(z > 0, h, 0)
    prefixes = [z[:, :end] @ sae.W_dec[:end, 0] + sae.b_dec[0] for end in (0, 4, 16, 32, 64)]
    errors = [(X[:, 0] - prefix).square().mean() for prefix in prefixes]
    expected = torch.stack(errors if bias_level else errors[1:]).mean()
    mine = sae.losses(out)["reconstruction"]
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(out.x_hat[:, 0], prefixes[-1])
    parameters = [sae.W_enc, sae.W_dec, sae.b_dec]
    gradients = torch.autograd.grad(mine, parameters), torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_one_choice_among_all_latents():
    """P-39: a batch has k·b active latents in all, however they fall on the groups."""
    assert l0_per_row(nested()(X).code).sum() == 4 * len(X)


def test_the_auxiliary_loss_explains_what_the_whole_dictionary_leaves_over():
    sae, plain = nested(), build("batch_topk", "sae.normalize=none")
    plain.load_state_dict(sae.state_dict())
    for each in (sae, plain):
        each.batches_since_fired[:20] = 100
    out = sae(X)
    sae.batches_since_fired.copy_(plain.batches_since_fired)
    torch.testing.assert_close(sae.auxk_loss(out), plain.auxk_loss(out))
    assert sae.auxk_loss(out) > 0


@pytest.mark.parametrize("cls", [MatryoshkaSAE, MatryoshkaTopKSAE, NestedVanilla])
def test_active_groups_truncate_the_code_after_the_choice_and_only_in_eval(cls):
    sae = nested(cls)
    for _ in range(3):
        trained = sae(X)
    sae.eval()
    whole = sae.encode(X)
    sae.active_groups = 2
    part = sae.encode(X)
    assert torch.equal(part[:, :16], whole[:, :16])
    assert not part[:, 16:].any()
    assert whole[:, 16:].any()
    torch.testing.assert_close(sae.reconstruct(X), sae.decode(part))
    torch.testing.assert_close(sae(X).x_hat, sae.decode(part))
    assert sae.config["active_groups"] == 2
    sae.train()
    assert torch.equal(l0_per_row(sae(X).code), l0_per_row(trained.code))


@pytest.mark.parametrize("f", [1, 7, 48, 64, 100, 1000, 1024, 12288])
@pytest.mark.parametrize("d", [1, 16, 768])
def test_default_groups_fill_any_dictionary(f, d):
    sizes = doubling_group_sizes(f, d)
    assert sum(sizes) == f
    assert min(sizes) >= 1
    assert sizes[0] >= min(d, f)


def test_default_groups_are_the_authors_at_expansion_16():
    assert doubling_group_sizes(36864, 2304) == [2304, 2304, 4608, 9216, 18432]
    assert doubling_group_sizes(1024, 128) == [128, 128, 256, 512]
    assert build("matryoshka").sizes == [16, 16, 32]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ([4, 16, 32, 64], "must sum to the dictionary's 64 latents"),
        ([], "must sum to the dictionary's 64 latents"),
        ([64, 0], "must be null or a list of whole numbers of at least 1"),
        ([-4, 68], "must be null or a list of whole numbers of at least 1"),
    ],
)
def test_sizes_that_are_not_increments_are_refused(sizes, sentence):
    """P-41: cumulative widths sum to more than n_latents."""
    with pytest.raises(UserError, match=sentence):
        MatryoshkaSAE(k=4, d_in=16, n_latents=64, group_sizes=sizes)


def test_more_active_groups_than_there_are_is_refused():
    with pytest.raises(UserError, match="must lie between 1 and the 4 groups"):
        nested(active_groups=5)


def test_the_base_rule_is_a_choice_of_the_command_line():
    sae = build("matryoshka", "sae._target_=sae_lab.saes.matryoshka.MatryoshkaTopKSAE", "sae.group_sizes=[32,32]")
    assert type(sae) is MatryoshkaTopKSAE
    assert type(sae).from_config(sae.config).sizes == [32, 32]
