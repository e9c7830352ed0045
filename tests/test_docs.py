"""README.md and docs/*.md: every command names options that exist, and every Python block runs.

A fenced ```bash block: each `python -m sae_lab.X ...` or `sae-lab X ...` in it is composed by Hydra, so an option that
does not exist fails; of a sweep, its first job. What `train` would train is built, at the bundled model's width, so a
value that the SAE or the schedule does not take fails too. Words in capitals, such as FOLDER, stand for values.

A fenced ```python block is executed. The blocks of a page share one namespace and run in their order, in a folder that
holds a run at outputs/demo. (Give what a command of the page would have made to a block that needs it.)

Neither is looked at where the line before the fence is `<!-- not run: reason -->`, nor a ```python block with a
title: `title="my_sae.py"` means a file, not a session.
"""

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sae_lab.cli.replaced import allow_new_keys
from sae_lab.evaluation.metrics import ROW_METRICS
from sae_lab.runtime.errors import UserError
from sae_lab.saes.registry import Registered

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

FENCE = re.compile(r"( *)```([^`]*)$")
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FLAGS = {"-m", "--multirun", "--help", "--hydra-help"}
FLAGS_WITH_VALUE = {"--cfg", "--package", "--config-dir", "--config-name"}
WIDTH = 128  # d of the bundled model, for which the sizes of groups on the pages are meant
HYDRAS_OWN = ("hydra/launcher=", "hydra/sweeper=", "hydra.launcher.", "hydra.sweeper.")


class Block(NamedTuple):
    page: str
    line: int
    info: str
    code: str

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info.strip() else ""


class Command(NamedTuple):
    """What follows `python -m sae_lab.`: the module, and its arguments."""

    place: str
    module: str
    arguments: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that count."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, i = [], 0
    while i < len(lines):
        if fence := FENCE.match(lines[i]):
            indent, start = fence[1], i + 1
            end = lines.index(f"{indent}```", start)
            code = "".join(f"{line.removeprefix(indent)}\n" for line in lines[start:end])
            if not (start > 1 and NOT_RUN.search(lines[start - 2])):
                found.append(Block(page.name, start + 1, fence[2].strip(), code))
            i = end
        i += 1
    return found


def commands(block: Block) -> list[Command]:
    """The commands of this package in a bash block."""
    code = re.sub(r"\\\n *", " " * 2, block.code)
    return [
        Command(f"{block.page}:{block.line}", *found)
        for words in simple_commands(code)
        if (found := module_and_arguments(words)) is not None
    ]


def simple_commands(code: str) -> list[list[str]]:
    """Lists of words, as a shell would split a script at line ends, `;`, `&&`, `||`, `|` and `&`."""
    found = []
    for line in code.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        found.append([])
        for word in lexer:
            if set(word) <= set(";&|"):
                found.append([])
            else:
                found[-1].append(word)
    return found


def module_and_arguments(words: list[str]) -> tuple[str, tuple[str, ...]] | None:
    """Of `python -m sae_lab.train k=8` and of `sae-lab train k=8`; None for any other command."""
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1 : i + 2] and words[i + 1].startswith("sae_lab."):
            return words[i + 1].removeprefix("sae_lab."), tuple(words[i + 2 :])
        if word == "sae-lab" and i + 1 < len(words):
            return words[i + 1], tuple(words[i + 2 :])
    return None


def split(arguments: tuple[str, ...]) -> tuple[set[str], list[str]]:
    """Flags of Hydra, and overrides."""
    flags, overrides, waiting = set(), [], list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word in FLAGS_WITH_VALUE:
            waiting.pop(0)
        if word.startswith("-"):
            assert word in FLAGS | FLAGS_WITH_VALUE, f"{word} is no flag of Hydra"
            flags.add(word)
        else:
            overrides.append(word)
    return flags, overrides


def first_job(overrides: list[str]) -> list[str]:
    """The overrides of the first job of a sweep; of a search, with a number of each of its ranges."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [f"{o.get_key_element()}={o.value().start}" if is_range(o) else o.input_line for o in parsed]
    [[first, *_]] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(fixed), None)
    return list(first)


def is_range(override: Override) -> bool:
    return override.is_sweep_override() and isinstance(override.value(), IntervalSweep)


def check_launcher_and_sweeper(overrides: list[str]) -> None:
    """Look up presets and their keys in conf/hydra: the packages behind some of them need not be installed."""
    for kind in ("launcher", "sweeper"):
        names = [o.partition("=")[2] for o in overrides if o.startswith(f"hydra/{kind}=")]
        keys = [o.partition("=")[0] for o in overrides if o.startswith(f"hydra.{kind}.")]
        assert len(names) <= 1, names
        assert names or not keys, f"{keys} without hydra/{kind}="
        preset = OmegaConf.load(CONF / "hydra" / kind / f"{names[0]}.yaml") if names else None
        for key in keys:
            parent, _, leaf = key.removeprefix(f"hydra.{kind}.").rpartition(".")
            assert leaf in (OmegaConf.select(preset, parent) if parent else preset), key


def build_what_is_trained(cfg: DictConfig) -> None:
    sites = 2 * len(cfg.lm.base.sites) if "base" in cfg.lm else len(cfg.lm.get("sites") or [None])
    n_latents = cfg.n_latents or int(cfg.expansion * WIDTH)
    instantiate(cfg.sae, d_in=WIDTH, n_latents=n_latents, n_sources=sites)
    instantiate(cfg.schedule)(0, n_steps=1000)


def without_value(node: Any, key: str = "") -> list[str]:
    """The keys of a config whose value is ???: those that a command must give."""
    if isinstance(node, dict):
        return [missing for name, child in node.items() for missing in without_value(child, f"{key}.{name}".strip("."))]
    return [key] if node == "???" else []


COMMANDS = [c for page in PAGES for b in blocks(page) if b.language == "bash" for c in commands(b)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.place} {c.module}")
def test_every_option_of_a_command_exists(command):
    if not (CONF / f"{command.module}.yaml").is_file():
        assert find_spec(f"sae_lab.{command.module}") is not None
        return
    flags, overrides = split(command.arguments)
    check_launcher_and_sweeper(overrides)
    overrides = [o for o in overrides if not o.startswith(HYDRAS_OWN)]
    if flags & {"-m", "--multirun"}:
        overrides = first_job(overrides)
    if "--config-dir" in flags:  # whatever a folder of the reader's own holds
        OverridesParser.create().parse_overrides(overrides)
        return
    if command.module in ("evaluate", "features", "export", "steer", "compare"):
        overrides = allow_new_keys(overrides)
    cfg = compose(*overrides, config_name=command.module)
    if not flags & {"--help", "--cfg"}:
        assert without_value(OmegaConf.to_container(cfg)) == []
    if command.module == "train":
        build_what_is_trained(cfg)


@pytest.fixture
def demo_folder(demo_run, tmp_path, monkeypatch) -> Path:
    """The working directory: a copy of the folder in which a run lies at outputs/demo."""
    shutil.copytree(demo_run, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setattr(Registered, "registry", dict(Registered.registry))  # an SAE of a page stays on its page
    return tmp_path / "page"


def python_blocks(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language == "python" and "title=" not in b.info]


@pytest.mark.process
@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, demo_folder, own_row_metrics):
    names: dict[str, Any] = {"__name__": page.stem}
    for block in python_blocks(page):
        at_its_line = "\n" * (block.line - 1) + block.code  # for tracebacks
        exec(compile(at_its_line, str(page), "exec"), names)


@pytest.fixture
def own_row_metrics():
    """Take out again what a page adds to the metrics of this process."""
    before = dict(ROW_METRICS)
    yield
    ROW_METRICS.clear()
    ROW_METRICS.update(before)


# --- that the tests above look where they should


def page_of(tmp_path: Path, text: str) -> Path:
    (tmp_path / "page.md").write_text(text)
    return tmp_path / "page.md"


def test_blocks_are_found_and_passed_over_as_the_convention_says(tmp_path):
    text = (
        "```bash\none\n```\n\n<!-- not run: needs a GPU -->\n```bash\ntwo\n```\n"
        '```python\nx = 1\n```\n```python title="mine.py"\ny = 2\n```\n\n=== "Tab"\n\n    ```bash\n    three\n    ```\n'
    )
    found = blocks(page_of(tmp_path, text))
    assert [(b.language, b.code) for b in found] == [
        ("bash", "one\n"),
        ("python", "x = 1\n"),
        ("python", "y = 2\n"),
        ("bash", "three\n"),
    ]
    assert [b.line for b in found] == [2, 10, 13, 19]
    assert [b.code for b in python_blocks(tmp_path / "page.md")] == ["x = 1\n"]


def test_commands_are_read_as_a_shell_reads_them():
    code = (
        "pip install -e .   # python -m sae_lab.train\n"
        "CUDA_VISIBLE_DEVICES=1 python -m sae_lab.train k=8 \\\n    'lm.sites=[a,b]' & sae-lab report sweep_dir=X\n"
    )
    assert [(c.module, c.arguments) for c in commands(Block("page.md", 1, "bash", code))] == [
        ("train", ("k=8", "lm.sites=[a,b]")),
        ("report", ("sweep_dir=X",)),
    ]


@pytest.mark.parametrize(
    "typed",
    [
        "train bogus=1",
        "train sae.bogus=1",
        "train sae=bogus",
        "train -m k=1,2 data.bogus=1",
        "train -m hydra/launcher=bogus k=1,2",
        "train -m hydra/launcher=slurm hydra.launcher.bogus=1",
        "train -m hydra/sweeper=reach_l0 hydra.sweeper.bogus=1 'optimizer.bogus=interval(1,2)'",
        "train --bogus",
        "train lm=transformers",
        "train sae=jumprelu sae.penalty=bogus",
        "train schedule.warmup=1000",
        "evaluate encoder=own",
        "bogus k=1",
    ],
)
def test_an_option_that_does_not_exist_fails(typed):
    [command] = commands(Block("page.md", 1, "bash", f"python -m sae_lab.{typed}\n"))
    with pytest.raises((AssertionError, HydraException, FileNotFoundError, UserError)):
        test_every_option_of_a_command_exists(command)


def test_the_first_job_of_a_sweep_and_of_a_search():
    assert first_job(["sae=topk,vanilla", "k=8,16", "lm.sites=[a,b],[c,d]", "seed=0"]) == [
        "sae=topk",
        "k=8",
        "lm.sites=[a,b]",
        "seed=0",
    ]
    search = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "sae.auxk_coefficient=0,0.5", "sae=topk"]
    assert first_job(search) == ["optimizer.lr=0.0001", "sae.auxk_coefficient=0", "sae=topk"]


def test_the_design_page_names_every_file_of_a_room_once_and_no_other():
    page = (REPOSITORY / "docs" / "design.md").read_text().partition("### Why rooms")[0]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith(("| **", "| |"))]
    named: dict[str, list[str]] = {}
    for cell, files in rows:
        if room := cell.strip(" *`/"):
            assert room not in named, f"{room} has two rows"
            named[room] = names = []
        names += re.findall(r"`(\w+\.py)`", files)
    for room, names in named.items():
        there = (REPOSITORY / "sae_lab" / room.replace("commands", "")).glob("*.py")
        assert sorted(names) == sorted(file.name for file in there if not file.name.startswith("__")), room
    package = [file for file in (REPOSITORY / "sae_lab").rglob("*.py") if not file.name.startswith("__")]
    assert {*re.findall(r"`(\w+\.py)`", page)} == {file.name for file in package}  # those of folders inside as well
