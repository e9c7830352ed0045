"""What long work says of itself."""

from pathlib import Path

import pytest

from sae_lab.activations.buffer import Filling
from sae_lab.runtime import screen
from sae_lab.runtime.plain_text import short_count
from sae_lab.training.progress import seconds_left


def test_a_loop_without_a_terminal_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(screen.time, "perf_counter", lambda: clock[0])
    seen = []
    for item in screen.track("abcdef", "evaluating"):
        seen.append(item)
        clock[0] += 10.0
    assert "".join(seen) == "abcdef"
    assert capsys.readouterr().out == "evaluating 2/6  0:00:40 left\nevaluating 4/6  0:00:20 left\n"


def test_a_path_is_not_broken_and_equal_columns_are_one(capsys):
    screen.print_metrics({"l0": 16.0, "train_mode": {"l0": 16.0}}, Path("multirun", "k=8,sae=topk" * 8))
    screen.print_metrics({"l0": 15.5, "n_sources": 1, "train_mode": {"l0": 16.0}}, Path("demo"))
    said = capsys.readouterr().out
    assert said.startswith(f"multirun/{'k=8,sae=topk' * 8}\n")
    assert said.count("train mode") == 1
    assert "│ l0        │     15.5 │         16 │" in said


def test_the_time_left_reckons_filling_and_training_apart():
    """Blocks of 1,000 rows, 10 s to fill one and 1 s to train on 100; after the first step 11 s have passed."""
    filling = Filling()
    filling.add(1000, 10.0)
    assert seconds_left(900, 100, 11.0, 900, filling) == pytest.approx(9)
    assert seconds_left(2900, 100, 11.0, 900, filling) == pytest.approx(29 + 20)
    filling.add(1000, 10.0)
    assert seconds_left(1900, 1100, 31.0, 900, filling) == pytest.approx(19 + 10)


def test_the_time_left_expects_a_prefetched_block_to_take_as_long_as_the_last_one():
    filling = Filling()
    filling.add(1000, 10.0)
    filling.add(1000, 1.0)
    assert seconds_left(1900, 1100, 22.0, 900, filling) == pytest.approx(19 + 1)


def test_large_counts_are_short():
    counts = [999, 100_000, 1_000_000, 2_500_000, 3_000_000_000, 10**12]
    assert [short_count(n) for n in counts] == ["999", "100k", "1M", "2.5M", "3B", "1T"]
