"""Bytes that a rank sends in one training step, with n shares of the rows and m shards of the latents.

    along the data axis        2 (n - 1) / n · 4 P          a ring's all-reduce of the gradients of its P parameters
                               2 (n - 1) / n · f            counters of the latents that were active
    along the latent axis      (m - 1) · 4 k·b              values that are candidates, b rows of this rank
                               2 (m - 1) / m · 4 b·w·d      partial sums of x_hat; the same for the auxiliary loss
                               (m - 1) · 4 k_aux·b          candidates of the auxiliary loss, if that many are dead
    rows                       (R - 1) / R · b·c             of c bytes: each of R ranks computes B / R of a batch, and
                                                             sends each row to the m ranks that train on it

bench/plan/collectives.py measures the seconds of these collectives.
"""

from typing import NamedTuple

from sae_lab.planning.sizes import SAESize

OPERATIONS = 11
"""Collective operations of a step along one axis, of an SAE that selects over the batch: 4 gradients, 5 to select, the
counters and the threshold. Others have fewer."""


class Exchange(NamedTuple):
    """Bytes that a rank sends in one step, and in how many operations."""

    gradients: float = 0.0
    candidates: float = 0.0
    sums: float = 0.0
    activations: float = 0.0
    operations: int = 0

    @property
    def bytes(self) -> float:
        return self.gradients + self.candidates + self.sums + self.activations

    def seconds(self, bytes_per_second: float, per_operation: float) -> float:
        """Return the seconds that it takes, if nothing of it overlaps with the computation."""
        return self.bytes / bytes_per_second + self.operations * per_operation


def all_reduce(n: int, n_bytes: float) -> float:
    """Return the bytes that a rank of n sends in a ring's all-reduce of so many bytes."""
    return 2 * (n - 1) / n * n_bytes


def exchange(sae: SAESize, batch_size: int, n: int, m: int, bytes_per_token: int, separate_lm: bool) -> Exchange:
    """Return what a rank exchanges in one step.

    Args:
        sae: the sizes of the whole SAE.
        batch_size: rows of all ranks together.
        n: shares of the rows.
        m: shards of the latents.
        bytes_per_token: c.
        separate_lm: the language model has devices of its own, so that all activations travel.
    """
    if n * m == 1 and not separate_lm:
        return Exchange()
    own, b = sae.shard(m), batch_size / n
    selected = sae.k * b if sae.sparse else 0.0
    travel = 1.0 if separate_lm else (n * m - 1) / (n * m)
    return Exchange(
        gradients=all_reduce(n, 4 * own.parameters + own.n_latents),
        candidates=(m - 1) * 4 * selected,
        sums=2 * all_reduce(m, 4 * b * sae.written),
        activations=travel * b * bytes_per_token,
        operations=(OPERATIONS if n > 1 else 0) + (OPERATIONS if m > 1 else 0) + 1,
    )


def dead_candidates(sae: SAESize, batch_size: int, n: int, m: int) -> float:
    """Return the bytes that a rank sends in one step for the auxiliary loss, if k_aux latents or more are dead.

    They are the values among which it chooses those of each row. Partial sums are among those of `exchange`.
    """
    return (m - 1) * 4 * sae.k_aux * batch_size / n
