"""What a GPU does that a CPU cannot: steps captured as CUDA graphs, from the step itself to runs, sweeps and kills."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import build, planted
from shell import Forked, run
from small_runs import N_STEPS, SMALL, assert_continues_to_the_bits_of

from sae_lab.training.capture import CapturedStep, prepare_step
from sae_lab.training.step import TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.process,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SAES = ["batch_topk", "topk", "matryoshka", "vanilla", "jumprelu", "gated"]
N = 24


def trained(sae, capture, precision=None, x_of=lambda i: planted(256, seed=i)[0]):
    """The step and the SAE's and optimizer's tensors after N steps."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    step = prepare_step(TrainingStep(sae, optimizer), capture)
    for i in range(N):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            step(x_of(i).cuda())
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return step, [*sae.state_dict().values(), *moments]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SAES)
def test_captured_and_eager_steps_are_equal_to_the_bit(name, precision):
    sae = build(name, "sae.dead_after=4", n_latents=512).cuda().train()
    _, eager = trained(copy.deepcopy(sae), False, precision)
    step, captured = trained(sae, True, precision)
    assert isinstance(step, CapturedStep)
    assert step.graphs
    assert [i for i, (a, b) in enumerate(zip(captured, eager, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("name", SAES)
def test_a_captured_step_is_the_step_of_a_cpu(name):
    sae = build(name, "sae.dead_after=4", n_latents=512).train()
    on_cpu = copy.deepcopy(sae)
    optimizer = torch.optim.Adam(on_cpu.parameters(), lr=1e-3, fused=True)
    step = TrainingStep(on_cpu, optimizer)
    for i in range(N):
        step(planted(256, seed=i)[0])
    sae = sae.cuda()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    captured = prepare_step(TrainingStep(sae, optimizer), True, "highest")
    for i in range(N):
        captured(planted(256, seed=i)[0].cuda())
    for key, value in on_cpu.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[key].cpu(), value, rtol=1e-2, atol=1e-3)


def test_a_captured_step_never_waits_for_the_gpu():
    """Nor for the numbers of a plan, which are on their way while the next step runs (training/plans.py)."""
    sae = build("batch_topk", n_latents=512).cuda().train()
    step, _ = trained(sae, True)
    x = planted(256)[0].cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "whole"
    done = run(*SMALL, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "not captured" not in done.stderr
    return folder


def test_a_run_is_the_same_captured_or_not(whole, tmp_path):
    done = run(*SMALL, "trainer.capture=false", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert_same_result(tmp_path, whole)


def test_a_stopped_run_continues_to_the_same_bits(whole, tmp_path):
    assert_continues_to_the_bits_of(whole, tmp_path / "run", SMALL, signal.SIGTERM, N_STEPS)


def stop_and_continue(folder: Path, signum: signal.Signals, *changes: str) -> None:
    """Stop a run by a signal after its first checkpoint, and start it again with changed settings."""
    forked = Forked(*SMALL, f"hydra.run.dir={folder}")
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert forked.running
    forked.send_signal(signum)
    forked.communicate()
    again = run(*SMALL, *changes, f"hydra.run.dir={folder}")
    assert again.returncode == 0, again.stderr


def assert_same_result(folder: Path, whole: Path) -> None:
    for file in ("metrics.json", "sae/sae.safetensors"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("changes", [[], ["trainer.capture=false"]], ids=["captured", "then eager"])
def test_a_killed_run_continues_to_the_same_bits(whole, tmp_path, changes):
    stop_and_continue(tmp_path / "run", signal.SIGKILL, *changes)
    assert_same_result(tmp_path / "run", whole)


def test_evaluation_again_gives_the_same_metrics(whole):
    before = json.loads((whole / "metrics.json").read_text())
    done = run(f"run_dir={whole}", module="evaluate")
    assert done.returncode == 0, done.stderr
    assert json.loads((whole / "metrics.json").read_text()) == before


def test_members_of_a_group_are_what_they_are_alone(whole, tmp_path):
    done = run("-m", *SMALL, "k=8,16", "hydra/launcher=shared_stream", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert_same_result(next(tmp_path.glob("*k=16*")), whole)


def test_a_run_of_a_gpu_continues_on_a_cpu(tmp_path):
    folder = tmp_path / "run"
    stop_and_continue(folder, signal.SIGTERM, "trainer=cpu")
    assert json.loads((folder / "metrics.json").read_text())["fvu"] < 1
