"""A worker of a harvest: it claims and writes shards that nobody has begun, and waits for those of others."""

import logging
import time
from collections.abc import Callable
from typing import Any

from sae_lab.activations.data import ActivationData
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Chunk
from sae_lab.cache.background import BackgroundWriter, HarvestEnded
from sae_lab.cache.claims import Claims
from sae_lab.cache.progress import Progress, name_of
from sae_lab.cache.ranges import Ranges, choose_free
from sae_lab.cache.shards import Shard
from sae_lab.runtime.errors import SafeStop
from sae_lab.runtime.screen import TokenProgress
from sae_lab.runtime.signals import raise_if_stopped
from sae_lab.text.rows import NextRows, RowStream

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks at what other workers have done, at most."""


class TextPosition:
    """A stream of text rows from which rows can be taken at any place.

    A stream without random access has to read all that it skips, so it starts from the nearest earlier shard whose
    state is known.
    """

    def __init__(self, rows: RowStream, progress: Progress, ranges: Ranges):
        self.rows, self.progress, self.ranges = rows, progress, ranges
        self.beginning, self.row = rows.state_dict(), 0

    def take_from(self, row: int, n: int) -> NextRows:
        """Return n text rows, the first of which is number `row`."""
        known = {self.ranges.of_shard(i).start: shard.begin for i, shard in self.progress.done.items()}
        before = max((start for start in known if start <= row), default=0)
        if not before <= self.row <= row:
            self.rows.load_state_dict(known.get(before, self.beginning))
            self.row = before
        self.rows.skip(row - self.row)
        self.row = row + n  # once they are taken
        return NextRows(self.rows, n)


class Worker:
    """Harvests shards until the cache is complete, beside any number of other workers.

    A thread writes each shard while the language model computes the next one; see background.BackgroundWriter.

    Args:
        write: writes a shard of that number from its chunks.
        is_complete: returns whether a worker has found that no shard is missing, and has ended the harvest.
        bar: shows what is done of the cache by all workers.
        before: activations that were stored before the first shard.
    """

    def __init__(
        self,
        data: ActivationData,
        ranges: Ranges,
        progress: Progress,
        claims: Claims,
        write: Callable[[int, list[Chunk]], Shard],
        is_complete: Callable[[], bool],
        bar: TokenProgress,
        before: int = 0,
    ):
        self.data, self.ranges, self.progress, self.claims = data, ranges, progress, claims
        self.is_complete, self.bar, self.before = is_complete, bar, before
        self.writer = BackgroundWriter(write, progress, claims, is_complete)

    def run(self, rows: RowStream) -> None:
        """Harvest until no shard is missing.

        Raises:
            SafeStop: a signal arrived. The shard that was then being computed is written.
        """
        try:
            self._run(TextPosition(rows, self.progress, self.ranges))
            self.writer.finish()
        except HarvestEnded:
            return
        except (Exception, SafeStop):  # not Interrupted, by which a second signal ends the process at once
            self.writer.finish_after_error()
            raise

    def _run(self, text: TextPosition) -> None:
        last, told = -1, False
        while not self._look():
            raise_if_stopped()
            number = self._choose(last)
            if number is not None and self._harvest(number, text):
                last = number
            elif self.is_complete():
                return
            elif number is None and self.writer.rows:
                self.writer.finish()
            elif number is None:
                if not told:
                    log.info("Other workers harvest the last shards: waiting for them.")
                told = True
                time.sleep(min(POLL, self.claims.lost_after / 10))

    def _look(self) -> bool:
        """Look at what all workers have done; return whether that is all."""
        self.progress.refresh()
        rows = {i: shard.rows for i, shard in self.progress.done.items()} | self.writer.rows
        self.bar.set_done(self.before + sum(rows.values()))
        return self.ranges.is_complete(self.progress.done)

    def _choose(self, last: int) -> int | None:
        """Return the shard after the last one, or one whose worker is lost, or another free one; else None."""
        n, claimed = self.ranges.n_needed(self.progress.done), self.progress.claimed
        done = {*self.progress.done, *self.writer.rows}
        if last + 1 < n and last + 1 not in {*done, *claimed}:
            return last + 1
        lost = (i for i in sorted(claimed) if i < n and i not in done and self.claims.is_lost(name_of(i)))
        return next(lost, choose_free(n, done, claimed))

    def _harvest(self, i: int, text: TextPosition) -> bool:
        """Claim shard i and begin to write it; return False if another worker has it or has done it.

        The end of a harvest removes the records. So the record is looked up before `is_complete`: if there is none, and
        the harvest has not ended afterwards, the shard is not done.
        """
        if not self.claims.take(name_of(i)):
            self.progress.claimed.add(i)
            return False
        begun = False
        try:
            if self.progress.has(i) or self.is_complete():
                return False
            chunks, begin = self._gather(i, text)
            self.writer.finish()
            self.writer.begin(i, chunks, begin)
            begun = True
        finally:
            if not begun:
                self.claims.release(name_of(i))
        return True

    def _gather(self, i: int, text: TextPosition) -> tuple[list[Chunk], dict[str, Any]]:
        """Return the activations of shard i, and the state of the text where they begin."""
        span = self.ranges.of_shard(i)
        rows = text.take_from(span.start, len(span))
        begin = rows.state_dict()
        return gather(self.data, rows, self._advance), begin

    def _advance(self, n: int) -> None:
        """Count n activations; raise the error of the shard before, if its write has failed."""
        self.bar.advance(n)
        self.writer.check()


def gather(data: ActivationData, rows: RowStream, advance: Callable[[int], None]) -> list[Chunk]:
    """Return the activations of all these text rows, on the CPU; call `advance` with the number of each chunk."""
    source = data.activations_of(rows)
    if data.prefetch:
        source = PrefetchedSource(source, 4 * data.lm_batch_rows * data.seq_len, data.lm.device)
    chunks = list[Chunk]()
    for chunk in data.keep_short(source):
        chunks.append(chunk._replace(rows=chunk.rows.to("cpu")))
        advance(len(chunk.rows))
    return chunks
