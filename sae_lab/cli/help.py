"""Text of `--help`: a command's config with its comments, and all choices of its groups."""

import re
import shutil
import textwrap
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf


# Hydra's own help lists every group for every command, and also fragments such as `_linear`, which are not choices.
def list_choices(config_name: str, *more: str) -> str:
    """List the groups that a command's config names, and those in `more`, each with its choices."""
    named = [next(iter(d)) for d in OmegaConf.load(conf_file(config_name)).defaults if d != "_self_"]
    groups = [*sorted(g for g in named if not g.startswith("override")), *more]
    lines = [
        textwrap.fill(
            f"{group}: {', '.join(group_options(group))}",
            min(96, screen_width()),
            initial_indent="  ",
            subsequent_indent="      ",
        )
        for group in groups
    ]
    return "\n".join(["Choices (name=choice)", *lines]) if lines else ""


def group_options(group: str) -> list[str]:
    """Return the choices of a group, then those of the groups inside it as the user types them: `matched/topk`."""
    loader = GlobalHydra.instance().config_loader()
    inner = sorted(loader.get_group_options(group, ObjectType.GROUP))
    nested = [f"{name}/{option}" for name in inner for option in group_options(f"{group}/{name}")]
    return [o for o in sorted(loader.get_group_options(group, ObjectType.CONFIG)) if o[0] != "_"] + nested


def config_text(config_name: str) -> str:
    """Return the text of a command's config with its comments, without the parts that only Hydra reads."""
    text = re.sub(r"\n(#.*\n)*hydra:\n(.*\n)*", "", conf_file(config_name).read_text())
    text = re.sub(r"^defaults:\n( .*\n)+", "", text, flags=re.MULTILINE)
    return fit_comments(text.strip(), screen_width()).replace(
        "$", "$$"
    )  # escaped, because Hydra inserts the text into a template


def screen_width() -> int:
    """Return the columns of the terminal; of a file or a pipe, what every line of conf/ fits into."""
    return shutil.get_terminal_size((130, 24)).columns


def fit_comments(text: str, width: int) -> str:
    """Break comments that are wider than the screen, those beside a key in the column where they begin.

    Lines that only continue such a comment are joined to it first. Examples, which are indented, are left alone.
    """
    blocks: list[list[str]] = []
    for line in text.splitlines():
        goes_on = bool(blocks) and line.startswith("  ") and line.lstrip().startswith("# ")
        same_column = goes_on and line.index("#") == blocks[-1][0].find(" # ") + 1
        blocks = [*blocks[:-1], [*blocks[-1], line]] if same_column else [*blocks, [line]]
    return "\n".join("\n".join(fit_comment(block, width)) for block in blocks)


def fit_comment(lines: list[str], width: int) -> list[str]:
    """Return a comment of one or more lines in lines of `width`, or of 40 characters where there is less room."""
    found = re.match(r"([^#]*)# (?! )", lines[0])
    if not found or max(map(len, lines)) <= width:
        return lines
    column = len(found[1])
    says = " ".join(line[column + 2 :].strip() for line in lines)
    wrapped = textwrap.wrap(says, max(40, width - column - 2), break_on_hyphens=False, break_long_words=False)
    return [found[1] + "# " + wrapped[0], *(" " * column + "# " + line for line in wrapped[1:])]


def conf_file(config_name: str) -> Path:
    return CONF / f"{config_name}.yaml"


PACKAGE = Path(__file__).resolve().parents[1]


# An installed wheel carries conf/ inside the package; a checkout keeps it at the top.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
