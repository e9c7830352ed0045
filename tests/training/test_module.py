"""The training step: what happens in which order, and that a run which stopped goes on."""

import pytest
import torch
from conftest import build, dictionary, planted
from fitting import BATCHES, N_STEPS, fit
from groups import config
from lightning.fabric.utilities import cloud_io
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.training.module import training_row
from sae_lab.training.run import train_run
from sae_lab.training.schedule import cosine, warmup_decay
from sae_lab.training.step import StepResult, TrainingStep, reset_optimizer_rows
from sae_lab.training.trainer import build_trainer, log_interval


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_the_step_is_project_clip_adam_renormalise(sae_name, max_grad_norm):
    """Against a loop written out by hand, in the order of TrainingStep's docstring, with the same schedule."""
    trained = fit(build(sae_name), max_grad_norm).sae
    sae = build(sae_name)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    for i, x in enumerate(BATCHES):
        adam.param_groups[0]["lr"] = 1e-2 * min(1, (i + 1) / 3, (N_STEPS - i) / 6)
        sae.resample(x)
        torch.stack(list(sae.losses(sae(x)).values())).sum().backward()
        g, w = dictionary(sae).W_dec.grad, dictionary(sae).W_dec.data
        g -= (g * w).sum((1, 2), keepdim=True) * w / w.square().sum((1, 2), keepdim=True)
        if max_grad_norm is not None:
            norm = torch.cat([p.grad.flatten() for p in sae.parameters() if p.grad is not None]).norm()
            for p in sae.parameters():
                if p.grad is not None:
                    p.grad *= min(1.0, max_grad_norm / norm)
        adam.step()
        adam.zero_grad()
        w /= w.flatten(1).norm(dim=1)[:, None, None]
    for name, value in sae.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def float16_steps(sae: BaseSAE, n: int, scale: float | None, batch: torch.Tensor, max_grad_norm: float | None = None):
    """Steps with products in float16; scale: of the loss, or None."""
    step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2), max_grad_norm)
    step.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    for _ in range(n):
        with torch.autocast("cpu", torch.float16):
            step(batch)
    return step


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("name", ["batch_topk", "vanilla"])
def test_steps_in_float16_follow_those_in_float32(name, max_grad_norm):
    batch = planted(64)[0]
    exact, scaled = build(name), build(name)
    step = TrainingStep(exact, torch.optim.Adam(exact.parameters(), lr=1e-2), max_grad_norm)
    losses = [step(batch).loss.item() for _ in range(6)]
    scaler = float16_steps(scaled, 6, 2.0**8, batch, max_grad_norm).scaler
    assert scaler.get_scale() == 2.0**11  # doubled after every second step
    assert (exact.W_dec.flatten(1).norm(dim=1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(exact(batch).x_hat, scaled(batch).x_hat, rtol=0.05, atol=0.05)
    assert losses[-1] < losses[0]


def test_a_step_whose_gradients_overflow_changes_nothing_and_halves_the_scale():
    batch = planted(64)[0]
    sae = build("vanilla")
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    step = float16_steps(sae, 1, 2.0**40, batch)
    for parameter, start in zip(sae.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, start, rtol=0, atol=1e-7)
    assert step.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize(
    ("log_every", "n_steps", "steps"),
    [("auto", 1, 1), ("auto", 49, 1), ("auto", 200, 4), ("auto", 9999, 50), (50, 49, 49), (3, 12, 3)],
)
def test_a_short_run_has_50_rows_unless_it_says_how_many(log_every, n_steps, steps):
    assert log_interval(log_every, n_steps) == steps


def test_float16_is_for_a_gpu(tmp_path):
    with pytest.raises(UserError, match=r"precision=16-mixed needs a GPU.*give precision=bf16-mixed"):
        build_trainer(tmp_path, 1, [], "cpu", 1, "16-mixed", 1, 1, 1)


def test_gradients_are_not_accumulated():
    with pytest.raises(MisconfigurationException, match="accumulation is not supported for manual optimization"):
        fit(build("topk"), accumulate_grad_batches=3)


STATEFUL = [
    ("topk", "sae.k_warmup=8"),
    ("batch_topk", "sae.quantile=running", "sae.k_warmup=8"),
    ("vanilla", "sae.resample_every=4", "sae.dead_after=2", "sae.sparsity_warmup=8"),
    ("gated", "sae.resample_every=3", "sae.dead_after=2", "sae.hidden=[8]"),
    ("topk", "sae.tied=true"),
    ("topk", "sae.normalize=mean_norm"),
    ("topk", "sae.normalize=whiten", "sae.b_dec_init=geometric_median"),
]


@pytest.mark.parametrize("settings", STATEFUL, ids=" ".join)
def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(settings, tmp_path):
    def make() -> BaseSAE:
        sae = build(*settings)
        with torch.no_grad():
            if sae.b_enc is not None:
                sae.b_enc[:20] = -10.0  # dead, for resampling
        return sae

    whole = fit(make())
    fit(make(), batches=BATCHES[:6]).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(make(), batches=BATCHES[6:], ckpt=tmp_path / "half.ckpt", max_epochs=2)
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    moments = [module.trainer.optimizers[0].state_dict()["state"] for module in (resumed, whole)]
    for i, state in moments[1].items():
        assert all(torch.equal(moments[0][i][key], state[key]) for key in state)
    sae = whole.sae
    assert sae.steps == N_STEPS
    assert sae.b_enc is None or (sae.b_enc[:20] > -1).all()  # it was resampled


def test_the_optimizer_forgets_the_rows_that_were_rewritten():
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    adam = torch.optim.Adam([p, q])
    (p.sum() + q.sum()).backward()
    reset_optimizer_rows(adam, p, torch.tensor([0, 2]))  # before its first step it remembers nothing
    adam.step()
    reset_optimizer_rows(adam, p, torch.tensor([0, 2]))
    for moment in ("exp_avg", "exp_avg_sq"):
        assert (adam.state[p][moment] != 0).any(dim=1).tolist() == [False, True, False, True]
        assert adam.state[q][moment].all()
    assert adam.state[p]["step"] == 1


def test_a_checkpoint_holds_the_saes_and_nothing_else():
    module = fit(build("batch_topk"))
    assert {name.split(".")[0] for name in module.state_dict()} == {"sae", "tokens"}


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.05), (9, 0.5), (19, 1.0), (79, 1.0), (80, 1.0), (90, 0.5), (99, 0.05)]
)
def test_warmup_and_decay(step, factor):
    assert warmup_decay(step, n_steps=100, warmup=0.2, decay=0.2) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        (
            (1000, 0),
            "warmup=1000 must be a share of the run's steps, .* for 1,000 of its 50,000 .*warmup=0.02",
        ),
        ((0, 500), "decay=500 must be a share .* for 500 of its 50,000 steps type decay=0.01"),
        ((60_000, 0), "for 2,500 of its 50,000 steps type warmup=0.05"),
        ((-1, 0), "warmup=-1 must be a share"),
        (("abc", 0), "warmup=abc must be a share"),
        ((None, 0), "warmup=null must be a share"),
        ((0, float("nan")), "decay=nan must be a share"),
        ((0.6, 0.5), "warmup=0.6 and decay=0.5 are shares .* sum to more than 1"),
    ],
    ids=str,
)
def test_what_is_no_share_of_the_steps_is_refused(shares, sentence):
    with pytest.raises(UserError, match=sentence):
        warmup_decay(0, 50_000, *shares)
    warmup_decay(0, 50_000, 0.02, 0.98)


def test_a_constant_schedule_is_one():
    assert {warmup_decay(i, 10, 0.0, 0.0) for i in range(11)} == {1.0}


def test_a_cosine_is_torchs():
    parameter = [torch.nn.Parameter(torch.zeros(1))]

    def rates(scheduler, n: int, **options) -> list[float]:
        optimizer = torch.optim.SGD(parameter, lr=1.0)
        schedule = scheduler(optimizer, **options)
        factors = []
        for _ in range(n):
            factors.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return factors

    torch_schedulers = torch.optim.lr_scheduler
    one = rates(torch_schedulers.CosineAnnealingLR, 41, T_max=40, eta_min=0.1)
    assert [cosine(i, 40, 0.0, final=0.1) for i in range(41)] == pytest.approx(one)
    for cycles, growth, first in ((4, 1, 10), (3, 2, 7)):
        n = sum(first * growth**i for i in range(cycles))
        restarted = rates(torch_schedulers.CosineAnnealingWarmRestarts, n, T_0=first, T_mult=growth, eta_min=0.2)
        assert [cosine(i, n, 0.0, 0.2, cycles, growth) for i in range(n)] == pytest.approx(restarted)
        assert cosine(n, n, 0.0, 0.2, cycles, growth) == pytest.approx(0.2)


def test_a_cosine_warms_up_first():
    assert [cosine(i, 100, 0.1) for i in (0, 4, 9, 10, 55, 100)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0], abs=1e-12)
    assert cosine(9, 10, 1.0) == 1.0
    with pytest.raises(UserError, match="warmup=50 must be a share"):
        cosine(0, 100, 50)
    with pytest.raises(UserError, match="final=2 must be a number of at least 0 and at most 1"):
        cosine(0, 100, 0.1, final=2)


def test_the_log_tells_the_sources_apart_and_counts_the_dead():
    sae, x = build("topk", n_sources=2), planted(64, n_sources=2)[0] * torch.tensor([[[1.0], [3.0]]])
    out = sae(x)
    terms = sae.losses(out)
    row = training_row(sae, StepResult(out, terms, terms["reconstruction"]))
    for i in range(2):
        error, spread = out.target - out.x_hat, out.target - out.target.mean(0)
        torch.testing.assert_close(row[f"fvu_{i}"], error[:, i].square().sum() / spread[:, i].square().sum())
    sae.batches_since_fired[:8] = sae.dead_after  # P-11: just dead, for the log as for the auxiliary loss
    sae.batches_since_fired[8:] = sae.dead_after - 1
    assert training_row(sae, StepResult(out, terms, terms["reconstruction"]))["dead_share"] == 8 / 64
    route = build("route", n_sources=2)
    assert "fvu_0" not in training_row(route, StepResult(route(x), terms, terms["reconstruction"]))


def test_a_local_folder_of_checkpoints_is_not_looked_for_in_object_storage(tmp_path, monkeypatch):
    """Lightning would import s3fs, gcsfs and adlfs, whichever is installed."""
    asked = []
    monkeypatch.setattr(cloud_io, "module_available", asked.append)
    train_run(config(tmp_path))
    assert asked == []
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert f"{ModelCheckpoint.__qualname__}{{" in " ".join(state)
