"""The stages run at a tiny size and are written down; how fast anything is, is not tested."""

import json

import pytest
from shell import run

pytestmark = pytest.mark.process

STAGES = ["text", "forward", "harvest", "cache write", "cache read", "step", "streaming", "cached"]
TINY = ["slice_tokens=2_048", "slices=1", "expansion=1", "data.block_tokens=2_048", "lm.device=cpu", "seq_len=32"]


def test_the_command_writes_every_stage(tmp_path):
    done = run(*TINY, "data.prefetch=true", f"hydra.run.dir={tmp_path}", module="throughput")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "throughput.json").read_text())
    assert list(figures["tokens_per_second"]) == STAGES
    assert all(rate > 0 for rate in figures["tokens_per_second"].values())
    assert all(stage in done.stdout for stage in STAGES)
    assert [p.name for p in tmp_path.iterdir()] == ["throughput.json"]
