"""Searches: what they minimise, the next guess for a number that leads to a wanted L0, and the command of the best."""

import json
import math
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml


def search_score(metrics: dict[str, Any], goal_l0: float | None) -> float:
    """What a search minimises: fvu, or the distance of l0 to its goal."""
    return metrics["fvu"] if goal_l0 is None else abs(metrics["l0"] - goal_l0)


def next_guess(tried: dict[float, float], goal: float, low: float, high: float) -> float | None:
    """The number between low and high that is likely to lead to the goal; None where no new one is.

    The secant through the two results nearest to the goal, log l0 against the log of the number, where it stays
    between the numbers that lead to too much and too little, else their middle. The first is the middle of the range;
    the second takes l0 to be inversely proportional.

    Args:
        tried: the l0 that each number has led to.
        goal: the l0 that is wanted.
    """
    points = sorted((math.log(c), math.log(max(l0, 1e-9) / goal)) for c, l0 in tried.items())
    left, right = math.log(low), math.log(high)
    for (x1, y1), (x2, y2) in pairwise(points):
        if y1 * y2 <= 0:
            left, right = x1, x2
    middle = (left + right) / 2
    guess = secant(sorted(points, key=lambda p: abs(p[1]))) if points else middle
    if len(points) > 1 and (left, right) != (math.log(low), math.log(high)) and not left < guess < right:
        guess = middle
    number = float(f"{math.exp(min(max(guess, left), right)):.3g}")
    return None if number in tried else number


def secant(nearest: list[tuple[float, float]]) -> float:
    """Where the line through the first two points meets zero; one point alone lies on a line of slope -1."""
    (x1, y1), *others = nearest
    slope = next(((y2 - y1) / (x2 - x1) for x2, y2 in others if y2 != y1), -1.0)
    return x1 - y1 / slope


def describe_best(folders: list[Path], goal_l0: float | None) -> str | None:
    """A sentence that tells which of these runs has the least score, and the command that trains it; None of none."""
    done = {f: json.loads(text.read_text()) for f in folders if (text := f / "metrics.json").is_file()}
    if not done:
        return None
    folder = min(done, key=lambda f: search_score(done[f], goal_l0))
    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    command = shlex.join(o for o in overrides if not o.startswith("goal_l0="))
    aim = "least fvu" if goal_l0 is None else f"nearest to goal_l0={goal_l0}"
    l0, fvu = done[folder]["l0"], done[folder]["fvu"]
    return f"The {aim}, with l0 {l0:.1f} and fvu {fvu:.4f}:\npython -m sae_lab.train {command}"
