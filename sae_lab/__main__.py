"""`python -m sae_lab`: the commands, each with the comment that opens its config."""

import re

from sae_lab.cli.help import CONF


def commands() -> dict[str, str]:
    """What there is to run as `python -m sae_lab.<name>`, and what it does; training first."""
    opening = {file.stem: re.match(r"# (.*?):?\n", file.read_text()) for file in sorted(CONF.glob("*.yaml"))}
    assert all(opening.values()), "every entry point's config opens with what it does"
    return {name: says[1] for name, says in sorted(opening.items(), key=lambda item: item[0] != "train") if says}


def main() -> None:
    for name, says in commands().items():
        print(f"python -m sae_lab.{name:<11} {says}")
    print("\nEach takes key=value, and --help prints its keys.")


if __name__ == "__main__":
    main()
