"""A batch taken in parts: the gradients, the state, the choice and the log of the whole batch, in less memory."""

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from conftest import SAE_NAMES, build, compose, dictionary, equal, planted
from fitting import BATCHES, DEAD, TRANSCODER, fit
from ranks import Call, rank_share, start_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lab.api.steps import training_step
from sae_lab.ops.auxk import batch_threshold
from sae_lab.ops.selection import select_top_of_batch
from sae_lab.parallel.collectives import (
    concatenate_ranks,
    gather_rows,
    mean_over_ranks,
    min_over_ranks,
    on_any_rank,
    sum_over_ranks,
)
from sae_lab.parallel.gradients import averaged_gradients
from sae_lab.parallel.mesh import data_axis, sharded_latents
from sae_lab.parallel.parts import remember, run_parts
from sae_lab.runtime.errors import UserError
from sae_lab.training.capture import PrepareSteps, prepare_step
from sae_lab.training.micro_batches import MicroBatchStep
from sae_lab.training.module import training_row
from sae_lab.training.options import check_options
from sae_lab.training.step import TrainingStep

# --- what parts tell each other


def test_parts_are_told_what_ranks_are():
    x = torch.tensor([5.0, -1.0, 2.0, 7.0, 0.0])
    sizes = [2, 2, 1]
    runs = []

    def run(i: int) -> list:
        mine = x.split(sizes[0])[i]
        runs.append(i)
        whole, own = concatenate_ranks(mine)
        return [
            (data_axis().size, data_axis().index),
            sum_over_ranks(mine.sum()).item(),
            mean_over_ranks(mine.mean()).item(),
            min_over_ranks(mine.min()).item(),
            on_any_rank(mine > 6)[:1].item() if i < 2 else on_any_rank(torch.zeros(2, dtype=torch.bool))[0].item(),
            (whole.tolist(), whole[own].tolist()),
        ]

    told = run_parts(sizes, run)
    assert [values[0] for values in told] == [(3, i) for i in range(3)]
    for i, values in enumerate(told):
        assert values[1:4] == [13.0, pytest.approx(13 / 5), -1.0]
        assert values[5] == (x.tolist(), x.split(2)[i].tolist())
    assert runs == [0, 1, 2] * 6  # one after the other, and again for each number that they wait for


def test_what_is_remembered_is_computed_once_and_forgets_what_it_was_told():
    computed = []

    def choose(i: int) -> float:
        gathered = remember(lambda: computed.append(i) or torch.tensor(float(i)))
        return sum_over_ranks(gathered).item() + sum_over_ranks(gathered).item()

    def run(i: int) -> tuple[float, float, float]:
        first = remember(lambda: choose(i))
        second = remember(lambda: 10 * first)
        return first, second, min_over_ranks(torch.tensor(float(i))).item()

    assert run_parts([1, 1, 1], run) == 3 * [(6.0, 60.0, 0.0)]
    assert computed == [0, 1, 2]


class Held:
    """Stands for what a part has in memory."""

    alive = 0

    def __init__(self):
        Held.alive += 1

    def __del__(self):
        Held.alive -= 1


def test_a_part_that_waits_leaves_nothing_in_memory():
    most = []

    def run(i: int) -> None:
        held = Held()  # noqa: F841
        most.append(Held.alive)
        sum_over_ranks(torch.ones(()))

    run_parts([1, 1, 1], run)
    assert most == 6 * [1]
    assert Held.alive == 0


def test_the_loss_of_gathered_rows_has_the_gradient_of_the_whole():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(rows: list[torch.Tensor]) -> torch.Tensor:
        W = torch.eye(3, dtype=torch.float64, requires_grad=True)

        def run(i: int) -> None:
            y = gather_rows(rows[i] @ W)
            ((y @ y.T).logsumexp(dim=0).sum() * len(rows[i]) / len(x)).backward()

        run_parts([*map(len, rows)], run) if len(rows) > 1 else run(0)
        return W.grad

    torch.testing.assert_close(gradient([x[:2], x[2:4], x[4:]]), gradient([x]), rtol=0, atol=1e-12)


def choose(parts: tuple[torch.Tensor, ...], k: float, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return select_top_of_batch([parts[i]], k).to_dense(), batch_threshold([parts[i]], int(k), False)


def test_the_largest_of_the_batch_are_chosen_whatever_the_parts():
    generator = torch.Generator().manual_seed(0)
    ties = torch.randint(-3, 4, (32, 48), generator=generator).float()
    lopsided = torch.randn(32, 48, generator=generator)
    lopsided[16:] *= 20
    scarce = torch.where(torch.rand(32, 48, generator=generator) < 0.01, 1.0, -1.0)
    for h in (ties, lopsided, scarce, lopsided.bfloat16()):
        for k in (1, 4, 7.37):
            parts = h.tensor_split(3)
            whole = select_top_of_batch([h], k).to_dense()
            chosen = run_parts([*map(len, parts)], functools.partial(choose, parts, k))
            assert torch.equal(torch.cat([code for code, _ in chosen]), whole)
            assert {bound.item() for _, bound in chosen} == {batch_threshold([h], int(k), False).item()}


# --- the step

SETTINGS = [
    *((name,) for name in SAE_NAMES),
    *(("batch_topk", f"sae.normalize={word}") for word in ("none", "constant_norm", "mean_norm", "centred", "whiten")),
    ("topk", DEAD),
    ("batch_topk", DEAD, "sae.auxk_selection=batch", "sae.k_aux=2"),
    ("batch_topk", "sae.quantile=running", "sae.k_warmup=8"),
    ("vanilla", DEAD, "sae.resample_every=2"),
    ("gated", DEAD, "sae.resample_every=2", "sae.hidden=[8]"),
    ("jumprelu", DEAD, "sae.frequency_coefficient=0.1", "sae.preact_coefficient=0.1", "sae.b_dec_init=mean"),
    ("topk", "sae.tied=true", "sae.l1_coefficient=0.01"),
    ("route", "sae.normalize=mean_norm", "sae.routing=soft"),
    ("vanilla", "sae.b_dec_init=geometric_median", "sae.b_enc_init=0.1"),
    ("batch_topk", DEAD, TRANSCODER, "sae.skip=true", "sae.normalize=mean_norm"),
]


@functools.cache
def start(settings: tuple[str, ...]):
    """An SAE in which some latents never fire, and the number of its sources."""
    n_sources = 2 if TRANSCODER in settings or "route" in settings else 1
    sae = build(*settings, n_sources=n_sources)
    inner = dictionary(sae)
    if hasattr(inner, "W_enc"):
        with torch.no_grad():
            inner.W_enc[:20] *= 0.01
            if inner.b_enc is not None:
                inner.b_enc[:20] = -10.0
    return sae, n_sources


def batches_for(sae, n_sources: int, n: int, rows: int = 36) -> list[torch.Tensor]:
    width = 2 if sae.reads_previous else 1
    return [
        torch.cat([planted(rows, seed=i)[0].roll(j, dims=2) for j in range(n_sources * width)], 1) for i in range(n)
    ]


def take_steps(settings: tuple[str, ...], m: int, n: int, dtype: torch.dtype, optimizer=torch.optim.Adam, lr=1e-3):
    """Parameters with their last gradients, the state and the last row of the log after n steps."""
    sae, n_sources = copy.deepcopy(start(settings))
    sae = sae.to(dtype).train()
    step = TrainingStep(sae, optimizer(sae.parameters(), lr=lr), max_grad_norm=0.05)
    step = step if m == 1 else MicroBatchStep(step, m)
    for x in batches_for(sae, n_sources, n):
        result = step(x.to(dtype), watch=lambda result: training_row(sae, result))
    gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return gradients, sae.state_dict(), result


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_gradients_state_and_log_are_those_of_the_whole_batch(settings):
    gradients, state, result = take_steps(settings, 1, 3, torch.float64)
    for m in (2, 4):
        gradients_of_parts, state_of_parts, result_of_parts = take_steps(settings, m, 3, torch.float64)
        assert gradients_of_parts.keys() == gradients.keys()
        assert result_of_parts.out is None
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradients_of_parts[name], gradient, rtol=0, atol=1e-10, msg=lambda m, n=name: n + m
            )
        for name, value in state.items():
            torch.testing.assert_close(state_of_parts[name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: n + m)
        for name, value in (result.watched | result.terms | {"loss": result.loss}).items():
            got = (result_of_parts.watched | result_of_parts.terms | {"loss": result_of_parts.loss})[name]
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-8, equal_nan=True, check_dtype=False)


def test_parts_of_different_lengths_weigh_by_their_rows(sae_name):
    gradients, _, _ = take_steps((sae_name,), 1, 2, torch.float64)
    gradients_of_parts, _, _ = take_steps((sae_name,), 5, 2, torch.float64)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_parts[name], gradient, rtol=0, atol=1e-8)  # some losses are float32


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka", "jumprelu"])
def test_weights_stay_those_of_whole_batches(name):
    _, state, _ = take_steps((name,), 1, 20, torch.float32)
    _, of_parts, _ = take_steps((name,), 2, 20, torch.float32)
    for name, value in state.items():
        torch.testing.assert_close(of_parts[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)


def test_the_last_part_of_a_short_batch_may_be_missing():
    sae, _ = copy.deepcopy(start(("batch_topk",)))
    step = MicroBatchStep(TrainingStep(sae.train(), torch.optim.SGD(sae.parameters(), lr=0.0)), 8)
    assert step(BATCHES[0][:3]).loss.isfinite()


# --- memory


class Largest(TorchDispatchMode):
    """Counts the entries of the largest tensor that is made."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.n = max(self.n, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["vanilla", "jumprelu", "gated"])
def test_the_largest_tensor_is_that_of_a_part(name):
    largest = {}
    for m in (1, 4):
        sae = build(name, d_in=4, n_latents=256).train()
        step = MicroBatchStep(TrainingStep(sae, torch.optim.Adam(sae.parameters())), m)
        with Largest() as counted:
            for x in planted(192, d_in=4)[0].split(64):
                step(x)
        largest[m] = counted.n
    assert largest[1] == 64 * 256
    assert largest[4] < 0.3 * largest[1]


# --- runs


IN_FOUR = PrepareSteps("auto", "auto", 4)


def test_a_run_in_parts_continues_to_the_bit(tmp_path):
    def make():
        return build("batch_topk", DEAD, "sae.normalize=mean_norm")

    whole = fit(make(), callbacks=[IN_FOUR])
    fit(make(), batches=BATCHES[:6], callbacks=[IN_FOUR]).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(make(), batches=BATCHES[6:], ckpt=tmp_path / "half.ckpt", max_epochs=2, callbacks=[IN_FOUR])
    assert isinstance(resumed.step, MicroBatchStep)
    assert equal(resumed.sae.state_dict(), whole.sae.state_dict())
    torch.testing.assert_close(resumed.sae.W_dec, fit(make()).sae.W_dec, rtol=0, atol=1e-5)


def test_parts_are_computed_in_the_precision_of_the_run():
    whole = fit(build("batch_topk"), precision="bf16-mixed")
    in_parts = fit(build("batch_topk"), precision="bf16-mixed", callbacks=[IN_FOUR])
    torch.testing.assert_close(in_parts.sae.W_dec, whole.sae.W_dec, rtol=0, atol=1e-3)


def test_the_gradients_of_all_parts_are_divided_by_the_scale_once():
    weights = []
    for m in (1, 4):
        sae = build("vanilla").train()
        step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2), max_grad_norm=0.05)
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        step = step if m == 1 else MicroBatchStep(step, m)
        for x in BATCHES[:3]:
            step(x)
        weights.append(sae.W_dec.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_a_loss_of_the_language_model_takes_whole_batches():
    with pytest.raises(UserError, match=r"loss=kl_mse .* give trainer.micro_batches=1"):
        check_options(compose("run_dir=x", "loss=kl_mse", "trainer.micro_batches=2"))


def test_a_batch_has_no_more_parts_than_rows():
    with pytest.raises(UserError, match=r"micro_batches=9 is the number of parts .* has only 8 rows: give a small"):
        check_options(compose("run_dir=x", "batch_size=8", "n_tokens=80", "trainer.micro_batches=9"))


def test_steps_in_parts_are_not_captured():
    sae = build("topk")
    step = prepare_step(MicroBatchStep(TrainingStep(sae, torch.optim.Adam(sae.parameters())), 2))
    assert isinstance(step, MicroBatchStep)
    assert "parts" in step.why_eager


@pytest.fixture(scope="module")
def both() -> Iterator[Call]:
    with start_ranks(2) as call:
        yield call


def steps_on_shares(settings: tuple[str, ...], m: int) -> dict[str, torch.Tensor]:
    sae, n_sources = copy.deepcopy(start(settings))
    step = TrainingStep(sae.train(), torch.optim.Adam(sae.parameters(), lr=1e-3), max_grad_norm=0.05)
    step = step if m == 1 else MicroBatchStep(step, m)
    for x in batches_for(sae, n_sources, 6):
        step(rank_share(x))
    return sae.state_dict()


@pytest.mark.process
@pytest.mark.parametrize(
    "settings", [("batch_topk", DEAD, "sae.normalize=mean_norm"), ("jumprelu",), ("temporal",)], ids=" ".join
)
def test_two_ranks_with_two_parts_train_the_sae_of_one_process(both, settings):
    alone, (first, second) = steps_on_shares(settings, 1), both(steps_on_shares, settings, 2)
    assert equal(first, second)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)


def gradients_beside_and_after() -> tuple[bool, list[bool]]:
    """Whether gradients averaged beside the backward pass have the bits of those averaged after it; what was begun
    when the encoder's gradient became final."""
    sae, _ = copy.deepcopy(start(("topk", "sae.b_dec_init=mean")))
    x = rank_share(BATCHES[0])
    begun = []
    with averaged_gradients(sae.parameters()):
        hook = sae.W_enc.register_hook(lambda gradient: begun.append(sae.W_dec.grad is not None))
        sae.train()(x).loss.backward()
    hook.remove()
    beside = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    other, _ = copy.deepcopy(start(("topk", "sae.b_dec_init=mean")))
    other.train()(x).loss.backward()
    after = [p.grad for p in other.parameters() if p.grad is not None]
    for gradient in after:
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return equal(beside, after), begun


@pytest.mark.process
def test_gradients_averaged_beside_the_backward_pass_are_those_averaged_after_it(both):
    assert both(gradients_beside_and_after) == [(True, [True]), (True, [True])]


def steps_on_a_shard(settings: tuple[str, ...], m: int) -> tuple[range, dict[str, int], dict[str, torch.Tensor]]:
    with sharded_latents(m):
        sae = build(*settings).train()
        step = MicroBatchStep(TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-3), max_grad_norm=0.05), 2)
        for x in BATCHES[:4]:
            step(rank_share(x))
        return sae.own_latents, sae.latent_axes(), sae.state_dict()


@pytest.mark.process
@pytest.mark.parametrize("settings", [("batch_topk",), ("jumprelu",)], ids=" ".join)
def test_two_shards_with_two_parts_train_the_sae_of_one_process(both, settings):
    _, _, alone = steps_on_a_shard(settings, 1)
    for own, axes, state in both(steps_on_a_shard, settings, 2):
        for name, value in alone.items():
            expected = value.index_select(axes[name], torch.tensor(own)) if name in axes else value
            torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)


def test_a_loop_of_ones_own_takes_a_batch_in_parts():
    whole, in_parts = (build("batch_topk") for _ in range(2))
    for sae, m in ((whole, 1), (in_parts, 4)):
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        steps = [training_step(sae, optimizer, x, micro_batches=m) for x in BATCHES[:4]]
        assert (steps[-1].out is None) == (m > 1)
    torch.testing.assert_close(whole.W_dec, in_parts.W_dec, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.threshold, in_parts.threshold, rtol=0, atol=1e-5)
