"""Output on the terminal: progress bars for long loops, and tables. Training's bar is in training/progress.py."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track
from rich.table import Table
from rich.text import Text

from sae_lab.runtime.plain_text import for_terminal

T = TypeVar("T")
console = Console(markup=False)  # paths and settings hold brackets; no text here is meant as markup
WITH_BAR = 100
"""Columns of a terminal that has room for a bar: the numbers of a long run take 80, and rich cuts them to keep it."""


def track(items: Sequence[T], description: str, seconds: float = 15.0) -> Iterator[T]:
    """Iterate over `items` and show the progress: a bar on a terminal, else a line every `seconds`."""
    if console.is_terminal:
        yield from rich_track(items, description, console=console, transient=True)
        return
    start = last_print = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - last_print >= seconds:
            last_print = now
            left = (now - start) / done * (len(items) - done)
            print(f"{description} {done}/{len(items)}  {format_duration(left)} left", flush=True)
        yield item


class TokenProgress:
    """Shows tokens done, tokens/s and the time left: a bar on a terminal, else a line after 3 s, then every `seconds`.

    Args:
        total: tokens at the end.
        done: tokens done before this process began.
    """

    def __init__(self, description: str, total: int, done: int, seconds: float = 15.0):
        self.description, self.total, self.done, self.seconds = description, total, done, seconds
        self._first, self._start = done, time.perf_counter()
        self._last_print = self._start - seconds + 3.0
        columns = [TextColumn(description), *([BarColumn()] if console.width >= WITH_BAR else [])]
        columns += [TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")]
        columns += [TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done, rate=0.0)

    def __enter__(self) -> "TokenProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        """Replace the total, of which there is only an estimate."""
        self.total = total
        self._bar.update(self._task, total=total)

    def set_done(self, done: int) -> None:
        """Set the tokens that are done, where other processes work on the same."""
        self.done = done
        self.advance(0)

    def advance(self, n: int) -> None:
        """Count n more tokens."""
        self.done = min(self.total, self.done + n)
        now = time.perf_counter()
        rate = (self.done - self._first) / (now - self._start)
        self._bar.update(self._task, completed=self.done, rate=rate)
        if not console.is_terminal and rate and now - self._last_print > self.seconds:
            self._last_print = now
            left = format_duration((self.total - self.done) / rate)
            counts = f"{self.done:,}/{self.total:,} tokens"
            print(f"{self.description} {counts}  {rate:,.0f} tokens/s  {left} left", flush=True)


def format_duration(seconds: float) -> str:
    """Format seconds as 0:04:10."""
    return str(timedelta(seconds=round(seconds)))


def print_metrics(
    metrics: dict[str, Any], run_dir: Path, columns: tuple[str, str] = ("deployed", "train mode")
) -> None:
    """Print an evaluation as a table: the deployed rule and, where it differs, the training rule beside it."""
    numbers = {name: value for name, value in metrics.items() if not isinstance(value, dict | list | str)}
    others = metrics.get("train_mode", {})
    both = any(name in others and others[name] != value for name, value in numbers.items())
    table = Table()
    for column in ("metric", *columns[: 1 + both]):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in numbers.items():
        other = [format_number(others[name]) if name in others else ""] if both else []
        table.add_row(name, format_number(value), *other)
    print_below(str(run_dir), table)


def under(title: str, table: Table) -> Group:
    """Return a table under its title, which may be as wide as the screen. rich breaks titles at a table's width."""
    return Group(Text(for_terminal(title), style="italic"), table)


def print_below(title: str, table: Table) -> None:
    """Print a table below its title, which may be wider than the screen: a path must not be broken."""
    console.print(for_terminal(title), style="italic", highlight=False, soft_wrap=True)
    console.print(table)


def print_activations(found: dict[str, Any], n_most: int = 20) -> None:
    """Print the latents that fire on a text (see evaluation/own_text.py)."""
    title = f"{found['n_active']} latents fire on {len(found['tokens'])} tokens; the strongest:"
    table = Table()
    for column in ("latent", "largest"):
        table.add_column(column, justify="right")
    for column in ("fires on", "where it is largest"):
        table.add_column(column, overflow="fold")
    for row in found["latents"][:n_most]:
        strongest = sorted(row["values"], key=lambda pair: -abs(pair[1]))
        at = strongest[0][0]
        before, after = ("".join(found["tokens"][max(0, i) : j]) for i, j in ((at - 6, at), (at + 1, at + 5)))
        fires_on = dict.fromkeys(repr(found["tokens"][i]) for i, _ in strongest[:4])
        where = Text.assemble(show_ends(before), (show_ends(found["tokens"][at]), "bold reverse"), show_ends(after))
        table.add_row(str(row["latent"]), format_number(row["max"]), for_terminal(" ".join(fires_on)), where)
    print_below(title, table)


def show_ends(text: str) -> str:
    """Return text on one line for the terminal, with its line ends as characters."""
    return for_terminal(text.replace("\n", "⏎").replace("\t", "⇥"))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows of strings and numbers as a table; the first column is of names."""
    table = Table()
    for i, column in enumerate(columns):
        side = "right" if i and not any(isinstance(row[i], str) for row in rows) else "left"
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(for_terminal(cell) if isinstance(cell, str) else format_number(cell) for cell in row))
    print_below(title, table)


def format_number(value: float) -> str:
    """Format a number with four significant digits, or a whole number with thousands separators."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def print_files(paths: Sequence[Path]) -> None:
    """Print the paths of written files, one per line."""
    for path in paths:
        print(for_terminal(str(path)))


def size_in_words(size: float) -> str:
    """Return bytes in GB, or in MB below 0.01 GB, with the unit."""
    return f"{gb(size)} GB" if size >= 0.01e9 else f"{size / 1e6:,.3g} MB"


def gb(size: float) -> str:
    """Return bytes in GB, with two digits at least."""
    return f"{size / 1e9:,.2f}" if size < 10e9 else f"{size / 1e9:,.0f}"
