"""Parameters rounded for products: the same bits as rounding them in each step, whatever changes them."""

import pytest
import torch
from conftest import build
from fitting import BATCHES, DEAD
from recorded_graph import Recorded

from sae_lab.ops.rounded import Rounded
from sae_lab.training.capture import WARM, CapturedStep, set_capturable
from sae_lab.training.step import TrainingStep


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """Steps on a CPU in fixed-size mode, as on a GPU."""
    monkeypatch.setattr("sae_lab.training.step.has_fixed_size", lambda x: True)


def step_of(sae, captured=False) -> TrainingStep:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    set_capturable(optimizer, True)
    step = TrainingStep(sae, optimizer)
    return CapturedStep(step, required=True, record=Recorded) if captured else step


def trained(kind: str, *settings: str, captured=False, change=lambda sae: None) -> TrainingStep:
    """A step after 12 batches in bf16; between two of them, something else changes the SAE."""
    sae = build(kind, *settings).train()
    step = step_of(sae, captured)
    for i, x in enumerate(BATCHES):
        with torch.autocast("cpu", torch.bfloat16):
            step(x)
        if i == WARM + 3:
            change(sae)
    return step


def never_kept(self, W, dtype):
    return W.detach().to(dtype)


@torch.no_grad()
def double_the_encoder(sae):
    sae.W_enc.mul_(2)


def restore_the_encoder(sae):
    sae.load_state_dict(build("topk", n_latents=64).state_dict() | {"steps": sae.steps})


CASES = [
    ("topk", []),
    ("batch_topk", [DEAD]),
    ("matryoshka", ["sae.group_sizes=[8,24,32]", DEAD]),  # whose W_enc has gradients beside the factors
    ("topk", ["sae.k_warmup=4"]),
]


@pytest.mark.parametrize("change", [lambda sae: None, double_the_encoder, restore_the_encoder])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_steps_have_the_bits_of_those_that_round_W_enc_each_time(kind, settings, captured, change, monkeypatch):
    change = change if kind == "topk" else double_the_encoder
    kept = trained(kind, *settings, captured=captured, change=change)
    sae, copy = kept.sae, kept.row_adam.copies[kept.sae.W_enc].copy
    assert torch.equal(copy, sae.W_enc.bfloat16())
    assert all(r.copy is None for p, r in kept.row_adam.copies.items() if p is sae.W_dec)  # which no product reads
    monkeypatch.setattr(Rounded, "of", never_kept)
    plain = trained(kind, *settings, change=change).sae
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in sae.state_dict().items())


def test_a_constraint_on_the_encoder_reaches_the_copy():
    sae = build("topk").train()

    class Bounded(type(sae)):
        def after_step(self):
            super().after_step()
            with torch.no_grad():
                self.W_enc.clamp_(-0.1, 0.1)

    sae.__class__ = Bounded
    step = step_of(sae)
    for x in BATCHES[:3]:
        with torch.autocast("cpu", torch.bfloat16):
            step(x)
        copy = step.row_adam.copies[sae.W_enc].copy
        assert copy.abs().max() <= 0.1 + 2**-10
        assert torch.equal(copy, sae.W_enc.bfloat16())


def test_float32_steps_keep_no_copy():
    sae = build("topk").train()
    step = step_of(sae)
    step(BATCHES[0])
    assert not step.row_adam.keeps_copies
    with torch.autocast("cpu", torch.bfloat16):
        step(BATCHES[1])
    assert step.row_adam.keeps_copies
    step(BATCHES[2])
    assert torch.equal(step.row_adam.copies[sae.W_enc].copy, sae.W_enc.bfloat16())
