"""What docs/data.md says is understood."""

from sae_lab.cli.help import CONF


def kinds_in_documentation(test: str) -> list[str]:
    """The kinds of data, in order, that name this file as their test."""
    table = (CONF.parent / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    return [row[0] for row in rows if row[-1] == f"`{test}`"]
