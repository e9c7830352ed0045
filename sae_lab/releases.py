"""List published SAEs that `load_sae` loads by name: `python -m sae_lab.releases gemma`."""

from collections.abc import Sequence
from typing import TypedDict

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/releases.yaml."""

    search: str | None
    every: bool


def words_as_search(arguments: Sequence[str]) -> list[str]:
    """Return `gemma 2b every=true` as `search='gemma 2b' every=true`."""
    words = [a for a in arguments if "=" not in a and not a.startswith("-")]
    rest = [a for a in arguments if a not in words]
    return [*rest, "search='" + " ".join(words).replace("'", "\\'") + "'"] if words else rest


@entry_point("releases", words_as_search)
def main(cfg: DictConfig) -> None:
    from sae_lab.interop.listing import find, lines
    from sae_lab.runtime.plain_text import for_terminal

    check_config(cfg, Options)
    found = find(str(cfg.search or "").split())
    print("\n".join(for_terminal(line) for line in lines(found, cfg.every)))


if __name__ == "__main__":
    main()
