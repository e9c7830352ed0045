"""docs/origin.md: its rows are all there, what they type composes, what they call exists, and their tests exist.

A row names what one of the five origin documents offers, what does it here, and the tests or pages that execute it. In
`here`, a span that begins with `sae-lab` is a command: Hydra composes it. One that begins with another program of SHELL
is for the shell. Any other span is Python: its names are those of `from sae_lab import ...`, full dotted names, or
OBJECTS, and each call must fit its signature.
"""

import ast
import builtins
import inspect
import itertools
import re
from importlib.metadata import distribution
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest
import test_docs
from conftest import compose
from fakes import Follow, UniqueWords
from test_docs import PAGES, REPOSITORY, Block, blocks, commands, python_blocks
from test_pitfalls import names_in

import sae_lab
from sae_lab.activations.data import ActivationData
from sae_lab.api.composing import Composed
from sae_lab.api.training import TrainedRun
from sae_lab.lm.base import LanguageModel

SECTIONS = {
    "The BatchTopK package": 30,
    "The TopK library for Gemma-2": 52,
    "The many-architecture framework": 45,
    "sae-kit": 22,
    "The BatchTopK write-up": 21,
}
MAY_BE_MISSING = 8
OBJECTS = {
    "activations": sae_lab.Activations,
    "composed": Composed,
    "data": ActivationData,
    "lm": LanguageModel,
    "out": sae_lab.SAEOutput,
    "run": TrainedRun,
    "sae": sae_lab.BaseSAE,
}
SHELL = ("make", "pip", "pytest", "tensorboard")


class Row(NamedTuple):
    section: str
    number: str
    offers: str
    here: str
    shown_by: str

    @property
    def is_missing(self) -> bool:
        return self.here.startswith("—: ")


def read_rows() -> list[Row]:
    rows, section = [], ""
    for line in (REPOSITORY / "docs" / "origin.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if re.match(r"\| \d", line):
            rows.append(Row(section, *(cell.strip() for cell in line.strip("|").split("|"))))
    return rows


ROWS = read_rows()
SPANS = sorted({span for row in ROWS if not row.is_missing for span in re.findall(r"`([^`]+)`", row.here)})
TYPED = [span for span in SPANS if span.startswith("sae-lab ")]
CALLED = [span for span in SPANS if span.split()[0] not in ("sae-lab", *SHELL)]


def test_every_section_has_all_of_its_rows():
    found = {name: [row.number for row in ROWS if row.section == name] for name in SECTIONS}
    assert found == {
        name: [f"{place}.{i}" for i in range(1, n + 1)] for place, (name, n) in enumerate(SECTIONS.items(), start=1)
    }
    assert len(ROWS) == sum(SECTIONS.values())
    assert [row.number for row in ROWS if not all(row)] == []


def test_few_rows_have_no_way_here_and_these_say_why():
    missing = [row for row in ROWS if row.is_missing]
    assert len(missing) <= MAY_BE_MISSING
    assert [row.number for row in missing if len(row.here.split()) < 8 or row.shown_by != "—"] == []
    assert [row.number for row in ROWS if not row.is_missing and "`" not in row.here] == []


def test_the_write_ups_set_up():
    cfg = compose("experiment=batchtopk_writeup")
    assert (cfg.lm.name, cfg.lm.sites) == ("gpt2", ["blocks.8.hook_resid_pre"])
    assert (cfg.batch_size, cfg.n_tokens, cfg.k, cfg.expansion) == (4096, 1_000_000_000, 32, 16)
    assert (cfg.optimizer.lr, cfg.optimizer.betas, cfg.optimizer._target_) == (3e-4, [0.9, 0.99], "torch.optim.Adam")
    sae = cfg.sae
    assert (sae.normalize, sae.dead_after, sae.k_aux, sae.auxk_coefficient) == ("per_token", 5, 512, 1 / 32)


def test_a_data_source_of_ones_own_gives_its_rows(tmp_path):
    """The data source of docs/extending.md, over a file of ten sections."""
    [source] = [b.code for b in blocks(REPOSITORY / "docs" / "extending.md") if "class SectionDocuments" in b.code]
    exec(source, own := {"__name__": "own"})
    sections = [UniqueWords()[i] for i in range(1, 11)]
    (tmp_path / "notes.txt").write_text("\n---\n".join(sections))
    settings = {"seq_len": 7, "batch_size": 16, "n_tokens": 200, "n_eval_tokens": 7, "n_val_tokens": 7}
    settings |= {"pack": True, "repeat": False, "prefetch": False, "block_tokens": 100, "lm_batch_rows": 4}
    settings |= {"exclude_bos": False, "exclude_first": 0, "order": "as_read"}
    data = own["sections"](Follow(), str(tmp_path / "notes.txt"), seed=0, held_out_every=10, **settings)
    held_out = {float(word) for word in sections[0].split()}
    seen = {x[0, 0].item() for x in itertools.chain.from_iterable(data.new_stream())} - {float(Follow.bos_id)}
    assert seen <= {float(word) for section in sections[1:] for word in section.split()}
    assert {float(i) for i in data.held_out_rows(7).flatten()} - {float(Follow.bos_id)} <= held_out
    assert len(seen) > 10


def test_every_row_names_tests_or_pages_that_execute_it():
    executed = {page.name for page in PAGES if python_blocks(page) or any(commands(b) for b in blocks(page))}
    wrong = []
    for row in (row for row in ROWS if not row.is_missing):
        named = re.findall(r"`([^`]+)`", row.shown_by)
        wrong += [row.number] if not named else []
        for name in named:
            file, _, test = name.partition("::")
            exists = test in names_in(file) if test else file.removeprefix("docs/") in executed
            wrong += [] if exists else [(row.number, name)]
    assert wrong == []


@pytest.mark.parametrize("typed", TYPED)
def test_a_command_composes(typed):
    [command] = commands(Block("origin.md", 0, "bash", typed + "\n"))
    test_docs.test_every_option_of_a_command_exists(command)


def test_what_the_shell_runs_is_there():
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    for program, *words in (span.split() for span in SPANS if span.split()[0] in SHELL):
        assert program != "make" or set(words) <= set(targets), words
        paths = [word for word in words if program == "pytest" and "/" in word]
        assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    [command] = distribution("sae-lab").entry_points.select(group="console_scripts", name="sae-lab")
    assert callable(command.load())


@pytest.mark.parametrize("called", CALLED)
def test_a_call_exists_and_fits_its_signature(called):
    tree = ast.parse(called)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            find(node)
        if isinstance(node, ast.Call):
            check_arguments(find(node.func), node, called)


def find(node: ast.AST) -> Any:
    """Return what a name or an attribute means; None for a variable of the reader, such as x, or of a value."""
    dotted = ast.unparse(node)
    if not re.fullmatch(r"[\w.]+", dotted):
        return None
    root, *attributes = dotted.split(".")
    if root == "sae_lab":
        return resolve_name(dotted)
    found = getattr(sae_lab, root) if root in sae_lab.__all__ else OBJECTS.get(root, getattr(builtins, root, None))
    assert found is not None or not attributes, f"{root} of {dotted} is not known"
    for attribute in attributes:
        found = attribute_of(found, attribute)
    return found


def attribute_of(found: Any, name: str) -> Any:
    """Return an attribute of a class or its objects; None for one that only objects have."""
    declared = {key for base in inspect.getmro(found) for key in vars(base).get("__annotations__", {})}
    assert hasattr(found, name) or name in declared, f"{found.__name__} has no {name}"
    return getattr(found, name, None)


def check_arguments(function: Any, call: ast.Call, called: str) -> None:
    """Bind the arguments of a call, if what is called is known and has a signature."""
    if inspect.isbuiltin(function):
        return
    if function is None:
        assert not isinstance(call.func, ast.Name), f"{ast.unparse(call.func)} of {called} is not known"
        return
    names = [keyword.arg for keyword in call.keywords if keyword.arg]
    if inspect.isclass(function) and issubclass(function, sae_lab.BaseSAE):
        assert set(names) <= set(function.arguments()), names
        return
    of_object = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in OBJECTS
    receiver = [None] if of_object and inspect.isfunction(function) else []
    inspect.signature(function).bind(*receiver, *call.args, **dict.fromkeys(names))


@pytest.mark.parametrize(
    "called",
    ["no_such(x)", "sae_lab.no_such(x)", "sae.no_such", "sae.encode()", "BatchTopKSAE(no_such=1)", "train_sae(y=1)"],
)
def test_a_call_that_does_not_exist_fails(called):
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        test_a_call_exists_and_fits_its_signature(called)
