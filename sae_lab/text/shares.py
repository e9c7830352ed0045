"""Interleave several streams by exact shares."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import gcd, lcm


def whole_shares(weights: Iterable[float]) -> tuple[int, ...]:
    """Return positive weights as the smallest integers in the same proportions: (0.7, 0.3) is (7, 3)."""
    fractions = [Fraction(str(weight)) for weight in weights]
    unit = lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * unit) for fraction in fractions]
    return tuple(share // gcd(*shares) for share in shares)


def next_parts(shares: Sequence[int], taken: Sequence[int], n: int) -> list[int]:
    """Return the parts from which the next n rows come, after `taken` rows of each part.

    Of the first m rows, for every m, part i has its share m·a_i/A to less than one row: at most 1 - 1/s away, where
    s = 2k - 2 and A is the sum of the k shares a_i. A row comes from a part with c_i rows so far that may have another
    one, m·a_i/A - c_i ≥ 1/s, and of these from the one that needs it first, by row (c_i + 1 - 1/s)·A/a_i. The numbers
    are integers, so nothing is rounded.

    References:
        Tijdeman, The chairman assignment problem, 1980.
    """
    counts, total, s = list(taken), sum(shares), 2 * len(shares) - 2
    parts = list[int]()
    for m in range(sum(counts) + 1, sum(counts) + n + 1):
        first, first_due, first_share = -1, 0, 1
        for i, share in enumerate(shares):
            if s * (m * share - total * counts[i]) >= total:
                due = s * (counts[i] + 1) - 1
                if first < 0 or due * first_share < first_due * share:
                    first, first_due, first_share = i, due, share
        counts[first] += 1
        parts.append(first)
    return parts
