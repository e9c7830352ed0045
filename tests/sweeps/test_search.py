"""The number that leads to a wanted L0: what is tried next, in how many trials it is found, and what is said of it."""

import json
import math

import pytest
from test_sweep import sweep

from sae_lab.sweeps.search import describe_best, next_guess, search_score
from sae_lab.sweeps.status import job_folders, read_status


def n_trials(l0_of, low: float = 1e-4, high: float = 1.0, goal: float = 16) -> int:
    """How many numbers are tried until one is within 5 % of the goal."""
    tried: dict[float, float] = {}
    while not tried or all(abs(l0 / goal - 1) > 0.05 for l0 in tried.values()):
        number = next_guess(tried, goal, low, high)
        assert low <= number <= high
        tried[number] = l0_of(number)
    return len(tried)


@pytest.mark.parametrize("root", [0.0003, 0.002, 0.03, 0.5])
def test_a_power_law_is_found_in_four_trials(root):
    for power in (-0.5, -1.0, -2.0, 1.0):
        assert n_trials(lambda c, power=power: 16 * (c / root) ** power) <= 4


@pytest.mark.parametrize("root", [0.0003, 0.002, 0.03, 0.5])
def test_a_curve_that_bends_and_ends_is_found(root):
    """L0 cannot exceed the dictionary, and dies out all at once above some penalty."""
    assert n_trials(lambda c: min(1024.0, 16 * (c / root) ** -1.5) if c < 3 * root else 0.0) <= 12


def test_guesses_are_short_numbers_and_end_where_the_range_does():
    assert next_guess({}, 16, 1e-4, 1e-2) == 0.001
    assert next_guess({0.001: 48}, 16, 1e-4, 1e-2) == 0.003
    assert next_guess({0.001: 40}, 16, 1e-4, 1e-2) == 0.0025
    assert next_guess({0.001: 20, 0.002: 10}, 15, 1e-4, 1e-2) == round(0.001 * 20 / 15, 5)
    tried = {0.001: 480.0, 0.01: 48.0}
    assert next_guess(tried, 16, 1e-4, 1e-2) is None  # 0.03 would be it
    assert next_guess(tried, 16, 1e-4, 1) == pytest.approx(0.03)


def leave_run(folder, **metrics) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(f"- sae=vanilla\n- goal_l0=16\n- lm.sites=[{folder.name}]\n")
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_the_best_run_is_told_as_a_command(tmp_path):
    leave_run(tmp_path / "a", l0=10.0, fvu=0.1)
    leave_run(tmp_path / "b", l0=17.0, fvu=0.2)
    command = "python -m sae_lab.train sae=vanilla 'lm.sites=["
    (tmp_path / "failed").mkdir()
    folders = [tmp_path / name for name in ("a", "b", "failed")]
    assert describe_best(folders, 16) == f"Best run (closest to goal_l0=16), with l0 17.0 and fvu 0.2000:\n{command}b]'"
    assert describe_best(folders, None) == f"Best run (lowest fvu), with l0 10.0 and fvu 0.1000:\n{command}a]'"
    assert describe_best(folders[2:], None) is None
    assert search_score({"l0": 10.0, "fvu": 0.5}, 16) == 6


@pytest.mark.process
def test_a_search_reaches_its_goal_and_continues(tmp_path):
    """By the command line; again, it trains nothing and says the same."""
    over = ["k=interval(1,100)", "hydra/sweeper=reach_l0", "goal_l0=40"]
    done = sweep(tmp_path, *over)
    assert done.returncode == 0, done.stderr
    folders = job_folders(tmp_path / "sweep")
    assert {read_status(folder)[0] for folder in folders} == {"complete"}
    l0 = [json.loads((folder / "metrics.json").read_text())["l0"] for folder in folders]
    nearest = min(l0, key=lambda l0: abs(l0 - 40))
    assert math.isclose(nearest, 40, rel_tol=0.05), l0
    sentence = f"Best run (closest to goal_l0=40), with l0 {nearest:.1f}"
    assert sentence in done.stdout
    assert " k=" in done.stdout.partition(sentence)[2]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "sweep").glob("*/*/*")}
    assert len(before) > 5 * len(folders)
    again = sweep(tmp_path, *over)
    assert sentence in again.stdout
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "sweep").glob("*/*/*")} == before


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        (["goal_l0=40"], "varies one number and nothing else"),
        (["goal_l0=40", "k=interval(1,2)", "seed=0,1"], "varies one number and nothing else"),
        (["goal_l0=40", "k=interval(0,2)"], "k=interval(0,2): a range must start above 0"),
        (["k=interval(1,2)"], "needs an L0 to reach: give goal_l0="),
    ],
)
def test_a_search_that_cannot_begin_says_why(over, sentence, monkeypatch):
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from hydra_plugins.sae_lab_plugins.reach_l0_sweeper import ReachL0Sweeper
    from sae_lab.cli.help import CONF
    from sae_lab.runtime.errors import UserError

    sweeper = ReachL0Sweeper(n_trials=3, tolerance=0.05)  # without a launcher
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        sweeper.config = GlobalHydra.instance().hydra.compose_config("train", over, run_mode=RunMode.MULTIRUN)
        with pytest.raises(UserError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
            sweeper.sweep(over)
