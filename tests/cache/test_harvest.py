"""The harvest as a user runs it, and training from what it wrote."""

import json

import pytest
from shell import run
from small_runs import N_EVAL, SMALL, assert_one_sentence

pytestmark = pytest.mark.process

CACHE = ["n_tokens=10_000", "shard_tokens=4_096", "seq_len=64", f"data.n_eval_tokens={N_EVAL}"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest") / "cache"
    done = run(*CACHE, f"cache_dir={folder}", module="harvest")
    assert done.returncode == 0, done.stderr
    assert "10,000 tokens x 1 site x 128 x float32 = 0.01 GB" in done.stderr
    assert "is complete: 10,000 tokens in 3 shards" in done.stderr
    return folder


def test_a_run_trains_from_it_and_is_evaluated_on_the_same_text(cache, tmp_path):
    done = run(*SMALL, "n_tokens=20_480", "data=cached", f"data.path={cache}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "End of the cache: starting pass 2 over it, in a new order." in done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_eval_tokens"] == N_EVAL
    assert metrics["fvu"] < 1


def test_mistakes_get_one_sentence(cache, tmp_path):
    assert_one_sentence(run(*CACHE, "k=3", f"cache_dir={cache}", module="harvest"), "no key k")
    cached = ["data=cached", f"data.path={cache}", f"hydra.run.dir={tmp_path}"]
    assert_one_sentence(run(*cached, "seq_len=128"), "seq_len is 64 in the cache and 128 here")
    other = run(*cached, "seq_len=64", "lm.sites=[transformer.h.1]")
    assert_one_sentence(other, "holds [transformer.h.2] of tiny, not [transformer.h.1]: choose lm.sites among these")


def test_verifying_names_a_damaged_shard(cache):
    shard = cache / "shard-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    damaged = run(*CACHE, f"cache_dir={cache}", "verify=true", module="harvest")
    assert_one_sentence(damaged, "damaged or missing files (shard-00002.safetensors): rewrite them with rebuild=true")
    mended = run(*CACHE, f"cache_dir={cache}", "rebuild=true", module="harvest")
    assert mended.returncode == 0, mended.stderr
    assert shard.read_bytes() == whole
