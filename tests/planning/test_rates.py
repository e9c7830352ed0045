"""Rates are fitted to measured points, and agree with them."""

import json

import pytest
from conftest import compose
from omegaconf import OmegaConf

from sae_lab.planning import rates
from sae_lab.planning.plan import known_models
from sae_lab.planning.rates import Fit, fit, rates_of, step_work
from sae_lab.planning.sizes import read_sizes, sae_size
from sae_lab.runtime.errors import UserError

MACHINES = ["h200", "cpu2"]


def planned(*overrides: str):
    return compose(*overrides, config_name="plan")


def test_a_fit_finds_the_seconds_of_each_unit():
    true, sizes = Fit((2e-12, 3e-9, 0.004)), [(1e9, 1e6, 1), (4e10, 3e6, 1), (2e9, 9e7, 1), (5e11, 1e8, 1)]
    found = fit(sizes, [true(x) for x in sizes])
    assert found.seconds == pytest.approx(true.seconds)


def test_no_unit_takes_less_than_nothing_nor_less_than_the_peak_allows():
    assert all(seconds >= 0 for seconds in fit([(1.0, 1.0), (1.0, 2.0)], [2.0, 1.0]).seconds)
    assert fit([(1.0, 1.0)], [3.0], least=[0.0, 1.0]).seconds == pytest.approx((2.0, 1.0))


def test_fewer_measurements_than_terms_scale_the_machine():
    before = Fit((1.0, 2.0))
    assert before.through([], []) is before
    assert before.through([(1.0, 1.0)], [6.0])((2.0, 0.0)) == pytest.approx(4.0)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_is_as_fast_as_it_was_measured(machine):
    cfg = planned(f"machine={machine}")
    found = rates_of(cfg, {})
    for point in cfg.machine.step:
        work, seconds = rates.step_point(point, point["ms"])
        assert found.step(work) == pytest.approx(seconds, rel=0.2)
    for point in cfg.machine.forward:
        terms = rates.forward_terms(point["parameters"], point["d"], point["n_layers"])
        assert found.forward(terms) == pytest.approx(1 / point["tokens_per_second"], rel=0.1)


def test_figures_of_earlier_runs_take_the_place_of_the_machine(tmp_path):
    config = OmegaConf.to_container(planned("k=8"))
    stages = {"text": 5e5, "forward": 1e4, "step": 2e4, "cache write": 1e6, "cache read": 2e6}
    (tmp_path / "throughput.json").write_text(json.dumps({"tokens_per_second": stages, "config": config}))
    cfg = planned("k=8", f"rates=[{tmp_path}]")
    found, reading = rates_of(cfg, known_models()), read_sizes(cfg, known_models())
    assert 1 / found.forward(rates.forward_work(reading.lm, reading.n_layers)) == pytest.approx(1e4)
    assert 1024 / found.step(step_work(sae_size(cfg, reading), 1024)) == pytest.approx(2e4)
    assert (found.text, found.cache_read) == (5e5, 2e6 * 512)
    assert found.sources == (str(tmp_path),)


def test_a_benchmark_takes_the_place_of_the_steps(tmp_path):
    config = OmegaConf.to_container(compose("d_in=128", "n_latents=1024", "k=16", config_name="benchmark"))
    figures = {"step_ms": 50.0, "tokens_per_second": 81920.0, "config": config}
    (tmp_path / "benchmark.json").write_text(json.dumps(figures))
    cfg = planned("batch_size=4096", f"rates={tmp_path}/benchmark.json")
    found = rates_of(cfg, {})
    assert found.step(step_work(sae_size(cfg, read_sizes(cfg, known_models())), 4096)) == pytest.approx(0.05)


WRONG = '{"config": {"lm": 1}, "tokens_per_second": {"text": 0}}'


@pytest.mark.parametrize("content", ["{}", "[1]", '{"config": {', "\0", '{"config": 1, "tokens_per_second": 2}', WRONG])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "throughput.json").write_text(content)
    with pytest.raises(UserError, match="holds no figures of throughput or benchmark: give one of their files"):
        rates_of(planned(f"rates={tmp_path}"), {})
    with pytest.raises(UserError, match=r"rates=.*/none is neither throughput.json or benchmark.json nor a folder"):
        rates_of(planned(f"rates={tmp_path}/none"), {})
