"""Parameters rounded for products: the same bits as rounding them in each step, whatever changes them."""

import pytest
import torch
from conftest import build
from fitting import BATCHES, DEAD
from recorded_graph import Recorded
from step_kinds import MORE, STEPS, build_kind, rows

from sae_lab.ops.rounded import Rounded
from sae_lab.training.capture import WARM, CapturedStep, set_capturable
from sae_lab.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("fixed")


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


def write_from_a_vector(sae):
    vector = torch.nn.utils.parameters_to_vector(sae.parameters())
    torch.nn.utils.vector_to_parameters(vector * 0.9, sae.parameters())


def restore_the_encoder(sae):
    sae.load_state_dict(build("topk", n_latents=64).state_dict() | {"steps": sae.steps})


CASES = [
    ("topk", []),
    ("batch_topk", [DEAD]),
    ("matryoshka", ["sae.group_sizes=[8,24,32]", DEAD]),
    ("temporal", ["sae.group_sizes=[24,40]"]),  # whose gradients are no factors
    ("topk", ["sae.k_warmup=4"]),
]


@pytest.mark.parametrize("change", [lambda sae: None, double_the_encoder, write_from_a_vector, restore_the_encoder])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_steps_have_the_bits_of_those_that_round_W_enc_each_time(kind, settings, captured, change, monkeypatch):
    change = change if kind == "topk" else double_the_encoder
    kept = trained(kind, *settings, captured=captured, change=change)
    assert_copies_are_current(kept)
    assert kept.row_adam.copies[kept.sae.W_enc].copy is not None
    assert all(r.copy is None for p, r in kept.row_adam.copies.items() if p is kept.sae.W_dec)  # no product reads it
    monkeypatch.setattr(Rounded, "of", never_kept)
    plain = trained(kind, *settings, change=change).sae.state_dict()
    assert [name for name, value in kept.sae.state_dict().items() if not torch.equal(value, plain[name])] == []


def assert_copies_are_current(step: TrainingStep) -> None:
    for W, kept in step.row_adam.copies.items():
        assert kept.copy is None or torch.equal(kept.copy, W.bfloat16())


@pytest.mark.parametrize("kind", STEPS | MORE)
def test_copies_are_current_after_each_step_of_every_sae(kind):
    step = step_of(build_kind(kind))
    for seed in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            step(rows(step.sae, seed))
        assert_copies_are_current(step)


def test_copies_are_current_however_W_enc_is_updated():
    sae = build("topk").train()

    class Penalized(type(sae)):
        coefficient = 0.0

        def losses(self, out):
            return super().losses(out) | {"norm": self.coefficient * self.W_enc.square().mean()}

    sae.__class__ = Penalized
    step = step_of(sae)
    for x, coefficient, clip in zip(
        BATCHES, (0, 0, 9, 9, 0, 0, 0, 0), (*(None,) * 4, 0.01, 0.01, None, None), strict=False
    ):
        sae.coefficient, step.max_grad_norm = coefficient, clip
        with torch.autocast("cpu", torch.bfloat16):
            step(x)
        assert_copies_are_current(step)


@pytest.mark.parametrize("captured", [False, True])
def test_two_optimizers_may_take_turns(captured, monkeypatch):
    def trained():
        sae = build("temporal", "sae.group_sizes=[24,40]").train()
        steps = step_of(sae, captured), step_of(sae)
        for i, x in enumerate(BATCHES):
            with torch.autocast("cpu", torch.bfloat16):
                steps[i % 8 > 5](x)
        return sae.state_dict()

    kept = trained()
    monkeypatch.setattr(Rounded, "of", never_kept)
    assert [name for name, value in trained().items() if not torch.equal(value, kept[name])] == []


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
    assert not any(step.row_adam.copied)
    with torch.autocast("cpu", torch.bfloat16):
        step(BATCHES[1])
    assert any(step.row_adam.copied)
    step(BATCHES[2])
    assert torch.equal(step.row_adam.copies[sae.W_enc].copy, sae.W_enc.bfloat16())
