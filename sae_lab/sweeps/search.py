"""Searches: the score that they minimize, the next guess of a search for an L0, and the command of the best run."""

import math
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from sae_lab.runs.config import read_yaml
from sae_lab.sweeps.status import read_finite_metrics, read_status


def search_score(metrics: dict[str, Any], goal_l0: float | None) -> float | None:
    """Return the score that a search minimizes: fvu, or the distance of l0 to its goal. None if fvu is left out."""
    return metrics.get("fvu") if goal_l0 is None else abs(metrics["l0"] - goal_l0)


def next_guess(tried: dict[float, float], goal: float, low: float, high: float) -> float | None:
    """Return the next number between low and high to try; None if it has been tried already.

    A secant step on log l0 as a function of the log of the number, through the two results nearest to the goal. If it
    leaves the bracket (neighbouring numbers with l0 above and below the goal), the middle of the bracket is used. The
    first guess is the middle of the range; the second assumes that l0 is inversely proportional to the number.

    Args:
        tried: number → l0 of the finished jobs.
        goal: the wanted l0.
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
    """Return where the line through the first two points is zero. For a single point the slope is taken as -1."""
    (x1, y1), *others = nearest
    slope = next(((y2 - y1) / (x2 - x1) for x2, y2 in others if y2 != y1), -1.0)
    return x1 - y1 / slope


def describe_best(folders: list[Path], goal_l0: float | None) -> str | None:
    """Return a sentence about the run with the lowest score and the command that trains it; None if none is done."""
    done = {f: read_finite_metrics(f / "metrics.json") for f in folders if read_status(f)[0] == "complete"}
    scores = {f: score for f in done if (score := search_score(done[f], goal_l0)) is not None}
    if not scores:
        return None
    folder = min(scores, key=scores.__getitem__)
    overrides = read_yaml(folder / ".hydra" / "overrides.yaml")
    command = shlex.join(o for o in overrides if not o.startswith("goal_l0="))
    best = "lowest fvu" if goal_l0 is None else f"closest to goal_l0={goal_l0}"
    forms = {"l0": ".1f", "fvu": ".4f"}
    numbers = " and ".join(f"{m} {done[folder][m]:{form}}" for m, form in forms.items() if m in done[folder])
    return f"Best run ({best}), with {numbers}:\npython -m sae_lab.train {command}"
