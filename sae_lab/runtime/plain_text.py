"""Strings of others (names, settings, messages) as plain text wherever they are written: terminal, Markdown, CSV."""

import html
import re
import unicodedata

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def plural(n: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def short_count(n: float) -> str:
    """Return a large number with four digits at most: 100k, 2.5M, 3B, 1T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.4g}{letter}"
    return f"{n:.4g}"


def for_terminal(text: str) -> str:
    """Replace control characters, with which a name could move the cursor or recolor the screen, by U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def for_markdown(text: str) -> str:
    """Escape HTML, links, code, table columns and line ends; names keep their underscores."""
    return re.sub(r"([\\|\[\]`])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def for_code_span(text: str) -> str:
    """Take out what ends a code span of Markdown. All else is literal in one."""
    return " ".join(text.split()).replace("`", "'")


def for_csv(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would run as a formula; a number stays a number."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not NUMBER.fullmatch(text) else text
