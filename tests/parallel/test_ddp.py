"""Two processes that train one SAE: the rows, the choice, the weights and the files are those of one process."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import shell
import torch
import torch.distributed as dist
from conftest import SAE_NAMES, build, dictionary, equal
from fakes import Echo, data
from fitting import BATCHES, DEAD, TRANSCODER, fit
from groups import SMALL, config
from ranks import Call, rank_share, start_ranks
from safetensors.torch import load_file

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.ops.auxk import batch_threshold
from sae_lab.ops.selection import select_top_of_batch
from sae_lab.parallel.collectives import (
    concatenate_ranks,
    mean_over_ranks,
    min_over_ranks,
    on_any_rank,
    sum_over_ranks,
)
from sae_lab.parallel.group import on_rank_0
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.errors import SafeStop, UserError
from sae_lab.sweeps.shared_stream import train_jobs
from sae_lab.sweeps.status import read_status
from sae_lab.training.job import read_job
from sae_lab.training.run import build_data, fit_as_rank, open_run, train_run

pytestmark = pytest.mark.process

TWO = ["trainer=ddp", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def both() -> Iterator[Call]:
    with start_ranks(2) as call:
        yield call


# --- what they tell each other


def exchange() -> dict[str, Any]:
    mine = torch.arange(3.0) + 10 * rank()
    w = torch.tensor(2.0, requires_grad=True)
    (mean_over_ranks(w * mine.mean()) ** 2).backward()
    ragged, own = concatenate_ranks(mine[: 1 + 2 * rank()])
    nothing, _ = concatenate_ranks(mine[:0].short())
    return {
        "world": (world_size(), rank()),
        "total": sum_over_ranks(mine),
        "least": min_over_ranks(mine.to(torch.int16) * (1 - 2 * rank())),
        "anywhere": on_any_rank(mine > 11),
        "gradient": w.grad,
        "ragged": (ragged, own.start, own.stop),
        "nothing": nothing.shape,
        "share": rank_share(torch.arange(7)),
    }


def test_what_processes_tell_each_other(both):
    first, second = both(exchange)
    assert (first["world"], second["world"]) == ((2, 0), (2, 1))
    for got in (first, second):
        assert got["total"].tolist() == [10, 12, 14]
        assert got["least"].tolist() == [-10, -11, -12]
        assert got["anywhere"].tolist() == [False, False, True]
        assert got["ragged"][0].tolist() == [0, 10, 11, 12]
        assert got["nothing"] == (0,)
    # d (w · 6)² / dw = 2 · 12 · 6, as the mean over the ranks of 2 · 12 · (their own mean)
    assert [got["gradient"].item() for got in (first, second)] == [2 * 12 * 1, 2 * 12 * 11]
    assert [got["ragged"][1:] for got in (first, second)] == [(0, 1), (1, 4)]
    assert [got["share"].tolist() for got in (first, second)] == [[0, 1, 2], [3, 4, 5]]


def test_alone_nothing_is_touched():
    x = torch.randn(5)
    assert all(
        y is x
        for y in (sum_over_ranks(x), min_over_ranks(x), on_any_rank(x), mean_over_ranks(x), concatenate_ranks(x)[0])
    )
    assert torch.equal(rank_share(x), x)


# --- the choice among all entries


def chosen(h: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    return select_top_of_batch([rank_share(h)], k).to_dense(), batch_threshold([rank_share(h)], int(k), False)


def test_the_largest_of_the_batch_are_chosen_wherever_they_lie(both):
    generator = torch.Generator().manual_seed(0)
    ties = torch.randint(-3, 4, (32, 48), generator=generator).float()
    lopsided = torch.randn(32, 48, generator=generator)
    lopsided[16:] *= 20
    nothing = lopsided.clone()
    nothing[:16] = -1
    scarce = torch.where(torch.rand(32, 48, generator=generator) < 0.01, 1.0, -1.0)
    for h in (ties, lopsided, nothing, scarce, lopsided.bfloat16()):
        for k in (1, 4, 7.37):
            codes, bounds = zip(*both(chosen, h, k), strict=True)
            assert torch.equal(torch.cat(codes), select_top_of_batch([h], k).to_dense())
            assert [bound.item() for bound in bounds] == 2 * [batch_threshold([h], int(k), False).item()]


# --- the rows


class Counting(Echo):
    runs = 0

    def activations(self, tokens):
        self.runs += len(tokens)
        return super().activations(tokens)


def batches_of(state: dict | None, n: int, changes: dict) -> tuple[list[torch.Tensor], dict, int]:
    """The next n batches of a stream, where it then stands, and how many text rows the language model was run on."""
    d = data(**changes)
    d.lm = d.stream.source.source.lm = Counting()
    if state is not None:
        d.load_state_dict(state)
    batches = [batch for _, batch in zip(range(n), d.train_dataloader(), strict=False)]
    return batches, d.state_dict(), d.lm.runs


@pytest.mark.parametrize("changes", [{}, {"exclude_bos": True}, {"repeat": False, "n_tokens": 10_000}], ids=str)
def test_the_shares_are_the_batches_of_one_process(both, changes):
    whole, _, runs = batches_of(None, 10_000, changes)
    half, state, _ = batches_of(None, 6, changes)
    shares, _, theirs = zip(*both(batches_of, None, 10_000, changes), strict=True)
    n = 2 * (len(whole[-1]) // 2)
    for parts, batch in zip(zip(*shares, strict=True), [*whole[:-1], whole[-1][:n]], strict=True):
        assert torch.equal(torch.cat(parts), batch)
    assert runs <= sum(theirs) <= runs + 4  # no text row twice, but for the next chunk of each
    # From one process to two and back, in the middle of a block.
    continued, states, _ = zip(*both(batches_of, state, 3, changes), strict=True)
    assert equal(states[0], states[1])
    rest, _, _ = batches_of(states[0], 1, changes)
    got = [*half, *(torch.cat(parts) for parts in zip(*continued, strict=True)), *rest]
    assert all(torch.equal(a, b) for a, b in zip(got, whole[:10], strict=True))


def test_the_rows_are_the_same_while_the_next_are_harvested(both):
    shares, _, _ = zip(*both(batches_of_prefetching, 8), strict=True)
    whole, _, _ = batches_of(None, 8, {})
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(parts), batch)


def batches_of_prefetching(n: int) -> tuple[list[torch.Tensor], dict, int]:
    d = data(prefetch=True)
    try:
        return [batch for _, batch in zip(range(n), d.train_dataloader(), strict=False)], {}, 0
    finally:
        d.stream.close()


# --- the weights

TRAINED = [
    *((name,) for name in SAE_NAMES),
    ("topk", DEAD),
    ("batch_topk", DEAD, "sae.auxk_selection=batch", "sae.k_aux=2"),
    ("batch_topk", "sae.quantile=running", "sae.k_warmup=8"),
    ("vanilla", DEAD, "sae.resample_every=4"),
    ("gated", DEAD, "sae.resample_every=3", "sae.hidden=[8]"),
    ("topk", "sae.tied=true"),
    ("topk", "sae.normalize=mean_norm"),
    ("route", "sae.normalize=mean_norm"),
    ("topk", "sae.normalize=whiten"),
    ("vanilla", "sae.b_dec_init=geometric_median", "sae.b_enc_init=0.1"),
    ("batch_topk", DEAD, TRANSCODER, "sae.skip=true", "sae.normalize=mean_norm"),
]


def trained(settings: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A run on this process's shares, with some latents dead from the start."""
    n_sources = 2 if TRANSCODER in settings else 1
    batches = [torch.cat([rank_share(x).roll(i, dims=2) for i in range(n_sources)], dim=1) for x in BATCHES]
    sae = build(*settings, n_sources=n_sources)
    inner = dictionary(sae)
    if hasattr(inner, "W_enc"):
        with torch.no_grad():
            inner.W_enc[:20] *= 0.01
            if inner.b_enc is not None:
                inner.b_enc[:20] = -10.0
    return fit(sae, max_grad_norm=0.05, batches=batches).sae.state_dict()


@pytest.mark.parametrize("settings", TRAINED, ids=" ".join)
def test_two_processes_train_the_sae_of_one(both, settings):
    alone, (first, second) = trained(settings), both(trained, settings)
    assert equal(first, second)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# --- a run that stops and goes on


def run_part(folder: Path, fail_at: int | None) -> None:
    """A run's training as two processes do it; with `fail_at`, both fail when they draw that batch."""
    cfg = config(folder, *TWO, "sae=batch_topk", DEAD)
    draw, drawn = ShuffledBlocks.__next__, []

    def failing(self):
        drawn.append(None)
        if len(drawn) == fail_at:
            raise ArithmeticError
        return draw(self)

    ShuffledBlocks.__next__ = failing
    try:
        with ExitStack() as folder:
            fit_as_rank(read_job(cfg), on_rank_0(lambda: open_run(cfg)), build_data(cfg), folder)
    except ArithmeticError:
        assert fail_at is not None
    finally:
        ShuffledBlocks.__next__ = draw
    dist.barrier()


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(both, tmp_path):
    both(run_part, tmp_path / "whole", None)
    both(run_part, tmp_path / "parts", 7)
    assert torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt")["global_step"] == 4
    both(run_part, tmp_path / "parts", None)
    whole, parts = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert whole["global_step"] == 12
    for key in whole.keys() - {"callbacks"}:
        assert equal(whole[key], parts[key]), key
    logs = [pd.read_csv(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    pd.testing.assert_frame_equal(*(log.drop(columns="tokens_per_second") for log in logs))


# --- the command

MEMBERS = {"topk": ["sae=topk", "k=4"], "batch_topk": ["sae=batch_topk", "k=4"]}
SETTINGS = [*TWO, DEAD]
HYDRAS = {".hydra/hydra.yaml", ".hydra/overrides.yaml"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The runs of one process."""
    root = tmp_path_factory.mktemp("alone")
    for name, overrides in MEMBERS.items():
        train_run(config(root / name, *overrides, *SETTINGS, "trainer.devices=1"))
    return root


def assert_same_sae(theirs: Path, ours: Path) -> None:
    """Weights, thresholds, counters and training log to rounding; the same files."""
    a, b = (load_file(folder / "sae" / "sae.safetensors") for folder in (theirs, ours))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    logs = [pd.read_csv(folder / "metrics.csv").drop(columns="tokens_per_second") for folder in (theirs, ours)]
    pd.testing.assert_frame_equal(*logs, rtol=1e-4)
    assert logs[0]["loss/auxk"].max() > 0
    names = [
        {p.relative_to(folder).as_posix() for p in folder.rglob("*")} - {"train.log"} - HYDRAS
        for folder in (theirs, ours)
    ]
    assert names[0] == names[1]


def stopped(folder: Path) -> None:
    """The two processes of a run, of which the second gets a signal where it asks for its eighth batch."""
    draw, drawn = ShuffledBlocks.__next__, []

    def stopping(self):
        drawn.append(None)
        if len(drawn) == 8 and rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return draw(self)

    ShuffledBlocks.__next__ = stopping
    cfg = config(folder, *MEMBERS["batch_topk"], *SETTINGS)
    try:
        with pytest.raises(SafeStop, match="Stopped by SIGUSR1 at step 8 of 12, saved as"), ExitStack() as stack:
            fit_as_rank(read_job(cfg), on_rank_0(lambda: open_run(cfg)), build_data(cfg), stack)
    finally:
        ShuffledBlocks.__next__ = draw
    dist.barrier()


def test_a_signal_to_any_process_stops_all_at_one_step_and_the_command_continues(both, alone, tmp_path):
    folder = tmp_path / "batch_topk"
    both(stopped, folder)
    done = shell.run(*SMALL, *MEMBERS["batch_topk"], *SETTINGS, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing from step 8" in done.stderr
    assert_same_sae(alone / "batch_topk", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["batch_topk"]  # no other process made a folder of its own


def test_in_a_sweep(alone, tmp_path):
    jobs = ["sae=topk,batch_topk", "k=4", "hydra.sweep.subdir='${hydra:runtime.choices.sae}'"]
    done = shell.run("-m", *SMALL, *SETTINGS, *jobs, f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "sweep").iterdir()} == {*MEMBERS, "jobs.txt", "multirun.yaml"}
    assert [p.name for p in tmp_path.iterdir()] == ["sweep"]
    assert done.stderr.count("training 12 steps") == len(MEMBERS)
    for name in MEMBERS:
        assert_same_sae(alone / name, tmp_path / "sweep" / name)


# --- when something goes wrong


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch_size=127"], "batch_size=127 must be a multiple of trainer.devices=2"),
        (["n_tokens=1023"], "n_tokens=1023 must be a multiple of trainer.devices=2"),
        (["trainer.devices=0"], "trainer.devices=0 must be a whole number of at least 1"),
        (
            ["trainer.accelerator=cuda", "trainer.devices=64"],
            "=64 exceeds the . GPUs|cuda is not available, because torch finds",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        train_run(config(tmp_path / "run", *TWO, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_shared_stream_is_one_process(tmp_path):
    train_jobs([read_job(config(tmp_path / "run", *TWO))])
    status, reason = read_status(tmp_path / "run")
    assert status == "failed"
    assert reason.startswith("hydra/launcher=shared_stream trains in one process: leave it out, or trainer=ddp, ")
