"""What every back end of the frozen language model must do, on the bundled model."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sae_lab.evaluation.downstream import spliced_predictions
from sae_lab.lm import NnsightLM, TransformerLensLM, TransformersLM
from sae_lab.lm.finding import TINY, find_folder
from sae_lab.lm.token_ids import find_bos_id
from sae_lab.runtime.errors import UserError

# The same places by both back ends' names: (transformers, TransformerLens, index in output_hidden_states).
PLACES = {
    "after block 2": ("transformer.h.2", "blocks.3.hook_resid_pre", 3),
    "after block 0": ("transformer.h.0", "blocks.0.hook_resid_post", 1),
    "after block 4": ("transformer.h.4", "blocks.4.hook_resid_post", 5),
}
BACK_ENDS = {
    "transformers": (TransformersLM, 0),
    "transformer_lens": (TransformerLensLM, 1),
    "nnsight": (NnsightLM, 0),
}
needs_nnsight = pytest.mark.skipif(find_spec("nnsight") is None, reason="pip install 'sae-lab[nnsight]'")
EACH = [pytest.param(name, marks=needs_nnsight if name == "nnsight" else ()) for name in BACK_ENDS]


@pytest.fixture(scope="module")
def plain():
    """The model as `transformers` loads it, with no code of ours around it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(find_folder(TINY), dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=EACH)
def one_site(request):
    cls, name = BACK_ENDS[request.param]
    return cls(TINY, [PLACES["after block 2"][name]], device="cpu")


@pytest.fixture(scope="module", params=EACH)
def three_sites(request):
    """Sites out of the order in which the model computes them."""
    cls, name = BACK_ENDS[request.param]
    return cls(TINY, [PLACES[p][name] for p in ("after block 2", "after block 4", "after block 0")], device="cpu")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 4096, (3, 17), generator=torch.Generator().manual_seed(0))


def gpt2(lm) -> nn.Module:
    """The GPT-2 inside either back end."""
    return getattr(lm.model, "original_model", lm.model).transformer


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_attributes_are_read_from_the_model(one_site):
    assert (one_site.name, one_site.d, one_site.context, one_site.device.type) == (TINY, 128, 256, "cpu")
    assert one_site.bos_id == one_site.tokenizer.bos_token_id == 0
    assert one_site.tokenizer.pad_token is None  # as in the folder: no back end has changed it


def test_activations_are_the_hidden_states(one_site, plain, tokens):
    expected = plain(tokens, output_hidden_states=True).hidden_states[3]
    got = one_site.activations(tokens)
    assert got.shape == (3, 17, 1, 128)
    close(got[:, :, 0], expected)


def test_sites_come_in_the_order_asked_for(three_sites, plain, tokens):
    hidden = plain(tokens, output_hidden_states=True).hidden_states
    got = three_sites.activations(tokens)
    assert got.shape == (3, 17, 3, 128)
    close(got, torch.stack([hidden[3], hidden[5], hidden[1]], dim=2))


def test_the_model_stops_at_the_last_site(one_site, tokens):
    ran = []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(gpt2(one_site).h)]
    one_site.activations(tokens)
    stopped = set(ran)
    one_site.logits(tokens)
    for handle in handles:
        handle.remove()
    assert not stopped & {3, 4, 5}
    assert {3, 4, 5} <= set(ran)


def test_nothing_is_left_behind(three_sites, tokens):
    before = three_sites.logits(tokens)
    three_sites.activations(tokens)
    three_sites.logits(tokens, torch.zeros(3, 17, 3, 128))
    assert torch.equal(three_sites.logits(tokens), before)


def test_logits_are_the_models(one_site, plain, tokens):
    close(one_site.logits(tokens), plain(tokens).logits)


def test_clean_activations_put_back_give_clean_logits(three_sites, tokens):
    close(three_sites.logits(tokens, three_sites.activations(tokens)), three_sites.logits(tokens))


def test_splicing_equals_a_hand_written_hook(one_site, plain, tokens):
    handle = plain.transformer.h[2].register_forward_hook(lambda _m, _i, out: torch.zeros_like(out))
    by_hand = plain(tokens).logits
    handle.remove()
    spliced = one_site.logits(tokens, torch.zeros(3, 17, 1, 128))
    close(spliced, by_hand)
    assert (spliced - one_site.logits(tokens)).abs().max() > 1e-2


def test_each_site_gets_its_own_replacement(three_sites, plain, tokens):
    """Only the last site in the model's order decides the logits: axis s must not be mixed up."""
    replace = torch.randn(3, 17, 3, 128, generator=torch.Generator().manual_seed(1))
    handle = plain.transformer.h[4].register_forward_hook(lambda *_: replace[:, :, 1])
    by_hand = plain(tokens).logits
    handle.remove()
    close(three_sites.logits(tokens, replace), by_hand)


def test_what_is_not_replaced_comes_from_the_forward_pass(three_sites, plain, tokens):
    """Replaced before it, a later site is not clean: token 3 at block 4 sees what became of block 0."""
    replace = torch.randn(3, 17, 3, 128, generator=torch.Generator().manual_seed(1))
    where = torch.zeros(3, 17, 3, dtype=torch.bool)
    where[:, 3, 2] = where[:, 5, 1] = True  # block 0 at one token, block 4 at another

    def put(t, new):
        def hook(_m, _i, out):
            return torch.cat([out[:, :t], new[:, t : t + 1], out[:, t + 1 :]], dim=1)

        return hook

    blocks = plain.transformer.h
    handles = [blocks[0].register_forward_hook(put(3, replace[:, :, 2]))]
    handles.append(blocks[4].register_forward_hook(put(5, replace[:, :, 1])))
    by_hand = plain(tokens).logits
    for handle in handles:
        handle.remove()
    spliced = three_sites.logits(tokens, replace, where)
    close(spliced, by_hand)
    assert (spliced - three_sites.logits(tokens)).abs().max() > 1e-2


def test_back_ends_agree(tokens):
    a = TransformersLM(TINY, "transformer.h.2", device="cpu")
    b = TransformerLensLM(TINY, "blocks.3.hook_resid_pre", device="cpu")
    close(a.activations(tokens), b.activations(tokens))
    noise = torch.randn(3, 17, 1, 128, generator=torch.Generator().manual_seed(2))
    close(a.logits(tokens, noise), b.logits(tokens, noise))


HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")


@pytest.fixture(scope="module")
def lens():
    return TransformerLensLM(TINY, [f"blocks.{i}.{hook}" for i in range(6) for hook in HOOKS], device="cpu")


@pytest.mark.parametrize("back_end", [p for p in EACH if p.values != ("transformer_lens",)])
def test_back_ends_agree_at_transformer_lens_names(back_end, lens, tokens):
    lm = BACK_ENDS[back_end][0](TINY, lens.sites, device="cpu")
    assert lm.activations(tokens).shape == (3, 17, 30, 128)
    assert (lm.activations(tokens) - lens.activations(tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize("back_end", [p for p in EACH if p.values != ("transformer_lens",)])
@pytest.mark.parametrize("hook", HOOKS)
def test_back_ends_agree_on_ce_spliced(back_end, hook, tokens):
    site, cls = f"blocks.3.{hook}", BACK_ENDS[back_end][0]
    own, ref = cls(TINY, site, device="cpu"), TransformerLensLM(TINY, site, device="cpu")
    keep = tokens % 3 > 0

    def cross_entropy(lm) -> float:
        logits = spliced_predictions(lm, tokens, lm.activations(tokens), keep, lambda x: 0.5 * x).logits()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    clean = nn.functional.cross_entropy(ref.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert cross_entropy(own) == pytest.approx(cross_entropy(ref), abs=1e-4)
    assert abs(cross_entropy(ref) - clean) > 1e-3


@needs_nnsight
def test_nnsight_reads_and_writes_inputs(tokens):
    for name in ("transformer.h.4.input", "transformer.h.4.mlp.c_proj.input"):
        ours, ref = NnsightLM(TINY, name, device="cpu"), TransformersLM(TINY, name, device="cpu")
        x = ref.activations(tokens)
        assert torch.equal(ours.activations(tokens), x)
        assert torch.equal(ours.logits(tokens, 2 * x), ref.logits(tokens, 2 * x))


def test_nnsight_is_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setattr("sae_lab.lm.nnsight.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'sae-lab\[nnsight\]'") as e:
        NnsightLM(TINY, "transformer.h.2", device="cpu")
    assert "\n" not in str(e.value)


def test_the_model_is_frozen_and_autograd_may_save_activations(one_site, tokens):
    x = one_site.activations(tokens)
    assert not x.requires_grad
    assert not x.is_inference()
    weight = torch.ones(128, requires_grad=True)
    (x * weight).sum().backward()
    assert weight.grad is not None
    assert not any(p.requires_grad for p in one_site.model.parameters())
    assert not one_site.logits(tokens).requires_grad


def test_logits_are_differentiable_in_what_is_spliced(one_site, tokens):
    x_hat = one_site.activations(tokens).requires_grad_()
    one_site.logits(tokens, x_hat).logsumexp(-1).sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().sum() > 0


@pytest.mark.parametrize("back_end", EACH)
def test_dtype_is_the_models(back_end, tokens):
    cls, name = BACK_ENDS[back_end]
    lm = cls(TINY, PLACES["after block 2"][name], dtype="bfloat16", device="cpu")
    x = lm.activations(tokens)
    assert x.dtype == lm.logits(tokens).dtype == torch.bfloat16
    assert torch.equal(lm.logits(tokens, x.float()), lm.logits(tokens))


def test_heads_are_joined_and_split_again(tokens):
    lm = TransformerLensLM(TINY, "blocks.1.attn.hook_z", device="cpu")
    x = lm.activations(tokens)
    assert x.shape == (3, 17, 1, 128)
    close(lm.logits(tokens, x), lm.logits(tokens))


def test_compatibility_mode_is_another_activation_space(tokens):
    site = "blocks.3.hook_resid_pre"
    raw = TransformerLensLM(TINY, site, device="cpu")
    folded = TransformerLensLM(TINY, site, device="cpu", compatibility_mode=True)
    close(folded.logits(tokens).log_softmax(-1), raw.logits(tokens).log_softmax(-1))
    x = raw.activations(tokens)
    close(folded.activations(tokens), x - x.mean(-1, keepdim=True))
    assert not any(p.requires_grad for p in folded.model.parameters())


def bos_of(bos, eos, given=None):
    return find_bos_id("m", SimpleNamespace(bos_token_id=bos, eos_token_id=eos), given, n_ids=10)


def test_bos():
    assert bos_of(0, 5) == 0
    assert bos_of(3, 5) == 3
    assert bos_of(None, 5) == 5
    assert bos_of(None, 0) == 0
    assert bos_of(3, 5, given=0) == 0
    with pytest.raises(UserError, match=r"bos_id=\.\.\."):
        bos_of(None, None)
    with pytest.raises(UserError, match=r"^bos_id=10"):
        bos_of(3, 5, given=10)


def test_rows_longer_than_the_context(one_site):
    too_long = torch.zeros(1, 257, dtype=torch.long)
    for run in (one_site.activations, one_site.logits):
        with pytest.raises(UserError, match=r"seq_len=257 .* seq_len=256 or less"):
            run(too_long)


WRONG_SITES = [
    (TransformersLM, "transformer.h.9", r"no site 'transformer.h.9': did you mean .*transformer\.h\.5"),
    (TransformersLM, "blocks.3.hook_resid_prr", r"did you mean blocks\.3\.hook_resid_pre"),
    (
        TransformersLM,
        "blocks.3.hook_resid_mid",
        r"\.h\.0 \.\.\. transformer\.h\.5, or blocks\.i of hook_resid_pre, hook_attn",
    ),
    (TransformersLM, "transformer.h", "never computes"),
    (TransformersLM, "transformer", "does not hold one vector per token"),
    (TransformersLM, [], "at least one site"),
    (TransformersLM, ["transformer.h.2", "transformer.h.2"], "none twice"),
    (TransformersLM, ["transformer.h.2", "transformer.h.2.mlp.c_fc"], "different widths .*128.*512"),
    (TransformerLensLM, "blocks.3.hook_resid_prr", r"did you mean blocks\.3\.hook_resid_pre"),
    (TransformerLensLM, "transformer.h.2", r"choose among blocks\.0\.hook_resid_pre \.\.\. blocks\.5\.hook_resid_pre"),
    (TransformerLensLM, "blocks.1.attn.hook_pattern", "does not hold one vector per token"),
    (TransformerLensLM, "blocks.1.hook_attn_in", "TransformerLens does not compute this hook"),
]


@pytest.mark.parametrize(("cls", "sites", "message"), WRONG_SITES)
def test_wrong_sites(cls, sites, message):
    with pytest.raises(UserError, match=message) as e:
        cls(TINY, sites, device="cpu")
    assert "\n" not in str(e.value)


@needs_nnsight
def test_nnsight_runs_in_a_thread(tokens):
    """As the prefetching stream runs it."""
    lm = NnsightLM(TINY, "transformer.h.2", device="cpu")
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lm.activations, tokens).result(), lm.activations(tokens))
