"""docs/pitfalls.md answers for every pitfall that the original codes taught, and names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (REPOSITORY / "docs" / "pitfalls.md").read_text().splitlines()
    if line.startswith("| P-")
]


@cache
def names_in(file: str) -> set[str]:
    """The names by which pytest knows the tests of a file, without their parameters."""
    path, names = REPOSITORY / file, set[str]()
    for node in ast.parse(path.read_text()).body if path.is_file() else ():
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in names if name.split("::")[-1].startswith("test_")}


def test_all_seventy_five_are_there_in_order_and_every_cell_is_filled():
    assert [row[0] for row in ROWS] == [f"P-{n:02}" for n in range(1, 76)]
    assert [row for row in ROWS if len(row) != 3 or not all(row)] == []


def test_every_row_names_a_test_that_exists_or_says_why_it_cannot_occur():
    missing = []
    for number, _, here in ROWS:
        named = re.findall(r"`(tests/[^`]*)`", here)
        missing += [(number, test) for test in named if test.partition("::")[2] not in names_in(test.split("::")[0])]
        assert named or len(here.split()) >= 8, f"{number} has neither a test nor a sentence"
        assert here.count("tests/") == len(named), f"{number}: a test is named in backquotes"
    assert missing == []
