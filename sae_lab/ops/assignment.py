"""The best one-to-one matching of rows and columns."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray


def assign(scores: Float[np.ndarray, "n m"]) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Match min(n, m) rows with as many columns, one to one, such that the sum of their scores is largest.

    The Hungarian method with shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016), vectorized over the
    columns: O(min(n, m)² max(n, m)) at worst. Scores must be finite.

    Returns:
        The rows, in order, and the column of each.
    """
    if scores.shape[0] > scores.shape[1]:
        columns, rows = assign(scores.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    cost = -np.asarray(scores, dtype=np.float64)
    u, v = cost.min(axis=1), np.zeros(cost.shape[1])  # prices of rows and columns: cost - u - v is never below 0
    column_of, row_of = take_free_columns(cost)
    for row in np.flatnonzero(column_of < 0).tolist():
        augment(cost, u, v, column_of, row_of, row)
    return np.arange(len(cost)), column_of


def take_free_columns(cost: Float[np.ndarray, "n m"]) -> tuple[NDArray, NDArray]:
    """Give each row its cheapest column if no row before it has taken that. Returns partners of rows and of columns."""
    column_of, row_of = np.full(cost.shape[0], -1), np.full(cost.shape[1], -1)
    for row, column in enumerate(cost.argmin(axis=1)):
        if row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    return column_of, row_of


def augment(cost: NDArray, u: NDArray, v: NDArray, column_of: NDArray, row_of: NDArray, start: int) -> None:
    """Match row `start` along the cheapest path to a free column, and update the partners and prices in place."""
    distance, previous = np.full(len(v), np.inf), np.full(len(v), -1)
    open_ = np.ones(len(v), dtype=bool)
    row, reached, visited = start, 0.0, []
    while True:
        visited.append(row)
        via = reached + cost[row] - u[row] - v
        shorter = open_ & (via < distance)
        distance[shorter], previous[shorter] = via[shorter], row
        column = int(np.where(open_, distance, np.inf).argmin())
        reached, open_[column] = distance[column], False
        if row_of[column] < 0:
            break
        row = row_of[column]
    u[start] += reached
    others = np.array(visited[1:], dtype=int)
    u[others] += reached - distance[column_of[others]]
    v[~open_] -= reached - distance[~open_]
    while True:
        row = previous[column]
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return
