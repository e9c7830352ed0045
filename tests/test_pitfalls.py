"""docs/pitfalls.md answers for every pitfall that the original codes taught, and names tests and code that exist."""

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


@cache
def code_names() -> set[str]:
    """`Class.name` and `module.name` of sae_lab, with methods and whatever a module or a class body assigns."""
    names = set[str]()
    for path in (REPOSITORY / "sae_lab").rglob("*.py"):
        module = ast.parse(path.read_text())
        names |= {f"{path.parent.name if path.stem == '__init__' else path.stem}.{name}" for name in defined(module)}
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        names |= {f"{node.name}.{name}" for node in classes for name in defined(node)}
    return names


def defined(body: ast.Module | ast.ClassDef) -> set[str]:
    """What a module or a class says it has, at its own level."""
    names = {n.name for n in body.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assigned = [n for n in body.body if isinstance(n, ast.Assign | ast.AnnAssign)]
    targets = [t for n in assigned for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    return names | {t.id for t in targets if isinstance(t, ast.Name)}


def conf_keys() -> set[str]:
    """`group.key` of every choice of every group of conf/."""
    files = (REPOSITORY / "conf").glob("*/*.yaml")
    return {f"{file.parent.name}.{key}" for file in files for key in re.findall(r"^(\w+):", file.read_text(), re.M)}


def test_code_and_keys_that_are_named_exist():
    named = set(re.findall(r"`(\w+\.\w+)`", (REPOSITORY / "docs" / "pitfalls.md").read_text()))
    assert {"LinearSAE.encoder", "sae.bandwidth"} <= named
    assert named - code_names() - conf_keys() == set()
