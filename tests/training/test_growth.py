"""How a run ends: if n_tokens grows, it continues to the bits of a run of that length; a callback may stop it."""

import signal
import time

import pytest
from shell import Forked, run
from small_runs import SMALL, assert_one_sentence

from sae_lab.runs.growth import ends_with_smaller_batch, reason_not_to_grow

SHORT, LONG = "n_tokens=10_240", "n_tokens=20_000"
CONSTANT = [*SMALL, "optimizer.lr=1e-3", "schedule=constant"]
CONFIG = {
    "n_tokens": 20_480,
    "batch_size": 1024,
    "data.block_tokens": 10_000,
    "schedule._target_": "sae_lab.training.schedule.warmup_decay",
    "schedule.warmup": 0.0,
    "schedule.decay": 0.0,
}


@pytest.mark.process
def test_a_complete_run_grows_to_the_bits_of_a_longer_one(tmp_path):
    once, grown = tmp_path / "once", tmp_path / "grown"
    assert run(*CONSTANT, LONG, f"hydra.run.dir={once}").returncode == 0
    assert run(*CONSTANT, SHORT, f"hydra.run.dir={grown}").returncode == 0
    first = Forked(*CONSTANT, LONG, f"hydra.run.dir={grown}")
    while (grown / "metrics.json").is_file():
        assert first.running, first.communicate().stderr
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    again = run(*CONSTANT, LONG, f"hydra.run.dir={grown}")
    assert again.returncode == 0, again.stderr
    assert "continuing from step" in again.stderr
    for file in ("metrics.json", "sae/sae.safetensors"):
        assert (grown / file).read_bytes() == (once / file).read_bytes(), file
    refused = run(*CONSTANT, SHORT, f"hydra.run.dir={grown}")
    assert_one_sentence(refused, "n_tokens can only grow", f"init_from={grown}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"n_tokens": 50_000}, "n_tokens can only grow"),
        ({"schedule.decay": 0.2}, "the learning rate depends on n_tokens"),
        ({"optimizer.lr": "auto"}, "the learning rate depends on n_tokens"),
        ({"schedule._target_": "mine.cosine"}, "the learning rate depends on n_tokens"),
        ({"data.block_tokens": 20_481}, "shuffles fewer activations together"),
    ],
)
def test_a_run_grows_only_if_none_of_its_steps_would_change(change, reason):
    found = reason_not_to_grow(CONFIG | change, CONFIG | {"n_tokens": 40_000})
    assert found is None if reason is None else found is not None and reason in found


def test_the_last_batch_of_a_run_may_be_smaller():
    assert not ends_with_smaller_batch(CONFIG, step=20)
    assert ends_with_smaller_batch(CONFIG | {"n_tokens": 20_000}, step=20)
    assert not ends_with_smaller_batch(CONFIG | {"n_tokens": 20_000}, step=19)


@pytest.mark.process
def test_a_run_that_a_callback_stops_says_so(tmp_path):
    stop = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/fvu, stopping_threshold: 10}"
    done = run(*SMALL, f"+callbacks.stop={stop}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "a callback stopped the run at step 20 of 30" in done.stderr
