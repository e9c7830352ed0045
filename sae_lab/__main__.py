"""`sae-lab`: list the commands, or run one (`sae-lab train k=32` is `python -m sae_lab.train k=32`)."""

import difflib
import re
import sys
import textwrap
from importlib import import_module

from sae_lab.cli.closed_output import readers_may_leave
from sae_lab.cli.help import CONF, screen_width


def commands() -> dict[str, str]:
    """Every command with the comment that opens its config; train first."""
    opening = {file.stem: re.match(r"# (.*?)[.:]?\n", file.read_text()) for file in sorted(CONF.glob("*.yaml"))}
    assert all(opening.values()), "every command's config opens with what it does"
    return {name: says[1] for name, says in sorted(opening.items(), key=lambda item: item[0] != "train") if says}


def list_commands() -> None:
    for name, says in commands().items():
        print(textwrap.fill(f"sae-lab {name:<11} {says}", screen_width(), subsequent_indent=" " * 20))
    print("\nEach takes key=value; --help lists its keys.\n`sae-lab train` is `python -m sae_lab.train`.")


def main() -> None:
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        with readers_may_leave():
            list_commands()
        return
    name = sys.argv.pop(1)
    if name not in commands():
        close = difflib.get_close_matches(name, commands(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(commands())}."
        sys.exit(f"sae-lab: {name} is not a command: {hint}")
    import_module(f"sae_lab.{name}").main()


if __name__ == "__main__":
    main()
