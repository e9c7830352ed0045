"""`python -m sae_lab.plan`, as a shell calls it."""

import json

import pytest
from conftest import compose
from omegaconf import OmegaConf
from shell import run

from sae_lab.cli.one_run import take_sweep
from sae_lab.planning.show import duration

pytestmark = pytest.mark.process

ISSUE = ["lm=gemma2_2b", "k=64", "n_latents=131072", "n_tokens=4e9", "gpus=8"]


def test_ten_lines_of_settings_give_a_plan_and_leave_no_file(tmp_path):
    done = run(*ISSUE, module="plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("language model", "optimizer", "tokens/s", "(limits)", "device-hours", "18,432 GB of disk"):
        assert word in done.stdout
    assert done.stdout.startswith("For one NVIDIA H200 (machine=h200). Other machines: machine=cpu2.\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not [*tmp_path.iterdir()]


def test_a_sweep_is_one_table_of_the_streams_that_jobs_share(tmp_path):
    sweep = ["k=16,32", "expansion=8,16", "machine=cpu2", "hydra/launcher=shared_stream"]
    done = run("-m", *sweep, "out=plan.json", module="plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 pass over the language model" in done.stdout
    [group] = json.loads((tmp_path / "plan.json").read_text())["streams"]
    assert group["n_latents"] == [1024, 2048, 1024, 2048]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    alone = run(*sweep[:3], "out=alone.json", module="plan", cwd=tmp_path)
    assert "4 passes over the language model" in alone.stdout
    jobs = json.loads((tmp_path / "alone.json").read_text())["streams"]
    assert [job["name"] for job in jobs][1] == "k=16 expansion=16"
    assert group["chosen"]["hours"] < sum(job["chosen"]["hours"] for job in jobs)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["gpus=0"], "plan: gpus=0 must be a whole number of at least 1 and at most 1000000."),
        (["k=0"], "plan: k=0 must lie between 1 and the dictionary's 1024 latents."),
        (["machine=abacus"], "plan: machine=abacus is not known: it must be one of cpu2, h200."),
        (["lm=transformers", "lm.name=no/such", "lm.sites=[a.1]"], "plan: lm.name=no/such is not on this machine"),
        (["-m", "k=16,0"], "plan: k=0 must lie between 1"),
        (["out=/dev/null"], "plan: /dev/null cannot be used (It is not a file)"),
        (["rates=nowhere"], "plan: rates=nowhere is neither throughput.json or benchmark.json nor a folder"),
    ],
)
def test_a_mistake_is_one_sentence(settings, sentence):
    done = run(*settings, module="plan")
    assert done.returncode == 1
    assert done.stderr.startswith(sentence), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_short_time_is_not_in_hours():
    assert [duration(n) for n in (188, 1, 0.0578, 0.001)] == ["188 hours", "1 hour", "3.47 minutes", "3.6 seconds"]


def test_a_sweep_becomes_a_list():
    assert take_sweep(["-m", "k=16,32", "lm=tiny"]) == ["lm=tiny", "sweep=['k=16,32']"]
    assert take_sweep(["lm.sites=[a,b]", "--help"]) == ["lm.sites=[a,b]", "--help"]


def test_a_run_is_planned_with_the_settings_that_it_would_have():
    train, plan = (OmegaConf.to_container(compose(config_name=name)) for name in ("train", "plan"))
    assert {key: plan[key] for key in train} == train | {"run_dir": "plan"}
