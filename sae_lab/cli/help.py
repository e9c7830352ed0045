"""Text of `--help`: a command's config with its comments, and all choices of its groups."""

import re
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
            f"{group}: {', '.join(group_options(group))}", 96, initial_indent="  ", subsequent_indent="      "
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
    return text.strip().replace("$", "$$")  # escaped, because Hydra inserts the text into a template


def conf_file(config_name: str) -> Path:
    return CONF / f"{config_name}.yaml"


PACKAGE = Path(__file__).resolve().parents[1]


# An installed wheel carries conf/ inside the package; a checkout keeps it at the top.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
