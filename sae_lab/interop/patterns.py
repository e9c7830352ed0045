"""Patterns that stand for many names, in the table of releases."""

import re
from collections.abc import Iterator
from itertools import product

CHOICE = re.compile(r"\{([^{}]*)\}")
ONE_EACH = re.compile(r"\[([^\[\]]*)\]")


def expand(pattern: str, path: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield each name of a pattern with its path.

        expand("layer{0..1}_{a,b}")                      layer0_a, layer0_b, layer1_a, layer1_b; the path is the name
        expand("layer{0..1}", "saes/{0}/[x y]/{1}.pt")   ("layer0", "saes/layer0/x/0.pt"), ("layer1", ...)

    Args:
        pattern: a name in which {a,b} and {0..9} are choices; all combinations of them are meant.
        path: a path in which {0} is the name, {1} its first choice, and [x y] has one value for each name.
    """
    literals, choices = CHOICE.split(pattern)[::2], [options(choice) for choice in CHOICE.findall(pattern)]
    for i, chosen in enumerate(product(*choices)):
        name = literals[0] + "".join(a + b for a, b in zip(chosen, literals[1:], strict=True))
        template = "{0}" if path is None else ONE_EACH.sub(lambda values, i=i: values[1].split()[i], path)  # type: ignore[misc]
        yield name, template.format(name, *chosen)


def options(choice: str) -> list[str]:
    """Return the options of a choice: `a,b` or `0..9`."""
    first, dots, last = choice.partition("..")
    return [str(n) for n in range(int(first), int(last) + 1)] if dots else choice.split(",")
