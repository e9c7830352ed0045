"""Which text rows belong to which shard, and which shards are still to be harvested.

Shard i holds what is kept of the text rows

    [i·r, (i + 1)·r)        r = ⌈shard_tokens / m⌉        m: the most tokens that are kept of a row

so it is the same whoever harvests it, and when. At row t = ⌈n_tokens / m⌉, the least that can be enough, one shard ends
and the next begins: without left-out tokens, no row is read in vain.
"""

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import NamedTuple

from sae_lab.cache.shards import Shard


class Ranges(NamedTuple):
    """The ranges of text rows of the shards.

    Args:
        n_tokens: activations to store in all.
        shard_rows: text rows of a shard (r).
        row_tokens: the most activations that a text row gives (m).
    """

    n_tokens: int
    shard_rows: int
    row_tokens: int

    @property
    def end(self) -> int:
        """Row t."""
        return -(-self.n_tokens // self.row_tokens)

    @property
    def n_least(self) -> int:
        """Number of shards before row t."""
        return -(-self.end // self.shard_rows)

    def of_shard(self, i: int) -> range:
        """Return the text rows of shard i."""
        if i < self.n_least:
            return range(i * self.shard_rows, min((i + 1) * self.shard_rows, self.end))
        begin = self.end + (i - self.n_least) * self.shard_rows
        return range(begin, begin + self.shard_rows)

    def n_needed(self, done: Mapping[int, Shard]) -> int:
        """Return how many shards, from the first on, are certainly needed; if all are done, the cache is complete.

        Shards that are not done count with all their tokens. So more may be needed later, where tokens are left out.
        """
        n, before = self.n_least, 0
        while n != before:
            left_out = sum(len(self.of_shard(i)) * self.row_tokens - done[i].rows for i in done if i < n)
            short = self.n_tokens + left_out - self.end * self.row_tokens
            n, before = self.n_least + max(0, -(-short // (self.shard_rows * self.row_tokens))), n
        return min([n, *(i + 1 for i in done if self.is_last(i, done))])

    def is_complete(self, done: Mapping[int, Shard]) -> bool:
        n = self.n_needed(done)
        return sum(i < n for i in done) == n

    def is_last(self, i: int, done: Mapping[int, Shard]) -> bool:
        """Return whether the text is known to end in shard i."""
        return i in done and done[i].text_rows < len(self.of_shard(i))

    def shards(self, done: Mapping[int, Shard]) -> list[Shard]:
        """Return the shards of a complete cache, in order; of the last one only so many rows as are left to store."""
        shards, left = list[Shard](), self.n_tokens
        for i in sorted(done):
            if left and done[i].rows:
                shards.append(done[i]._replace(rows=min(left, done[i].rows)))
                left -= shards[-1].rows
            if self.is_last(i, done):
                break
        return shards


def choose_free(n: int, done: Collection[int], claimed: Collection[int]) -> int | None:
    """Return the shard, of n, at which a worker begins that cannot go on with the next one; None if none is free.

    It is the first shard of the longest run of free ones, or the middle one if another worker comes towards it. So each
    worker reads long stretches of text, and workers may come and go without agreeing on anything.
    """
    taken = sorted(i for i in {*done, *claimed} if i < n)
    before, after = max(pairwise([-1, *taken, n]), key=lambda run: run[1] - run[0])
    if after - before == 1:
        return None
    return (before + after) // 2 if before in claimed else before + 1
