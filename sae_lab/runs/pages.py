"""Pages in Markdown about steered text and compared dictionaries, with the numbers as JSON beside them."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lab import plots
from sae_lab.evaluation.matching import CLOSE, SHARED, Comparison, agreement
from sae_lab.runs.result_folders import places
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import read_json, write_atomically, write_json
from sae_lab.runtime.plain_text import for_code_span, for_markdown
from sae_lab.runtime.screen import format_number

N_LISTED = 25
"""Shared and own latents that a page of a comparison lists. The tables have all."""


def write_steering(found: dict[str, Any], folder: Path, suffix: str) -> list[Path]:
    """Write steer<suffix>.json and .md."""
    lines = [f"# Latent {found['latent']} of {for_markdown(found['sae'])}, mode={found['mode']}", ""]
    lines += [
        f"Prompt: `{for_code_span(found['prompt'])}`. Measured on {found['n_tokens']:,} held-out tokens, on which the "
        f"latent is active for {found['density']:.3%}, at most {format_number(found['max'])}.",
        "",
        *("| strength | value | CE (nats/token) | increase | KL |", "|---|---|---|---|---|"),
    ]
    for row in found["table"]:
        numbers = " | ".join(format_number(row[name]) for name in ("value", "ce", "ce_increase", "kl"))
        lines.append(f"| {name_of_strength(row, found['mode'])} | {numbers} |")
    for row in found["table"]:
        lines += ["", f"## {name_of_strength(row, found['mode'])}"]
        for text in row["texts"]:
            lines += ["", *(f"    {line}" for line in (found["prompt"] + text).splitlines())]
    json, page = folder / f"steer{suffix}.json", folder / f"steer{suffix}.md"
    write_json(json, found)
    write_atomically(page, "\n".join([*lines, ""]).encode())
    return [json, page]


def name_of_strength(row: Mapping[str, Any], mode: str) -> str:
    """Return what a row of the table of strengths is called."""
    if row["strength"] is None:
        return "without"
    return "ablated" if mode == "ablate" else f"{row['strength']:g}"


def check_comparison(folder: Path, sources: Mapping[str, tuple[str, str | None]]) -> None:
    """Raise a UserError if the folder holds a comparison of other SAEs."""
    file = folder / "compare.json"
    if file.is_file() and read_json(file).get("sources") != places(sources):
        raise UserError(f"{folder} holds a comparison of other SAEs: give another out=, or overwrite=true.")


def write_comparison_page(
    comparisons: Mapping[tuple[str, str], Comparison],
    folder: Path,
    sources: Mapping[str, tuple[str, str | None]],
    facts: str = "",
) -> list[Path]:
    """Write compare.json, a table of latents for each pair, a figure, and compare.md, which shows them.

    Tables of pairs that an earlier comparison left in the folder are removed.

    Args:
        sources: what `load_sae` read, by the names of the SAEs.
        facts: a line above the figure.
    """
    for i in itertools.count(len(comparisons)):
        if not (stale := folder / f"latents_{i}.csv").is_file():
            break
        stale.unlink()
    means = agreement(comparisons)
    lines = [f"# {' and '.join(dict.fromkeys(for_markdown(name) for pair in comparisons for name in pair))}", ""]
    lines += ["Means over all pairs:", "", "| measure | value |", "|---|---|"]
    lines += [f"| {name} | {format_number(value)} |" for name, value in means.items()]
    files, cosines = [], {}
    for i, ((a, b), comparison) in enumerate(comparisons.items()):
        name = f"{a} and {b}"
        files.append(folder / f"latents_{i}.csv")
        write_atomically(files[-1], comparison.latents.to_csv(index=False).encode())
        first = comparison.latents[comparison.latents["sae"] == a]
        cosines[name] = first["cosine"].dropna().to_numpy()
        lines += ["", f"## {for_markdown(name)}", "", f"All latents: [{files[-1].name}]({files[-1].name})"]
        lines += ["", "| measure | value |", "|---|---|"]
        lines += [f"| {for_markdown(key)} | {show(value)} |" for key, value in comparison.numbers.items()]
        lines += list_latents(comparison, a, b)
    figure = plots.matched_cosines(cosines, folder / "compare.png", (SHARED, CLOSE), facts)
    lines += ["", f"![Cosines of matched latents]({figure.name})", ""]
    numbers = [{"saes": [*pair]} | comparison.numbers for pair, comparison in comparisons.items()]
    write_json(folder / "compare.json", {"agreement": means, "pairs": numbers, "sources": places(sources)})
    write_atomically(folder / "compare.md", "\n".join(lines).encode())
    return [folder / "compare.md", folder / "compare.json", figure, *files]


def list_latents(comparison: Comparison, a: str, b: str) -> list[str]:
    """Return lines that list the closest shared latents, and of each SAE those that the other one has least of."""
    table = comparison.latents
    shared = table[(table["sae"] == a) & (table["cosine"] >= SHARED)].nlargest(N_LISTED, "cosine")
    pairs = ", ".join(f"{r.latent} = {r.partner} ({r.cosine:.2f})" for r in shared.itertuples())
    lines = ["", f"Shared, the closest first: {pairs or 'none'}"]
    for name in (a, b):
        own = table[(table["sae"] == name) & ~(table["cosine"] >= SHARED)].nsmallest(N_LISTED, "max_cosine")
        listed = ", ".join(f"{r.latent} ({r.max_cosine:.2f})" for r in own.itertuples())
        lines += ["", f"Only in {for_markdown(name)}, the farthest first: {listed or 'none'}"]
    return lines


def show(value: Any) -> str:
    return value if isinstance(value, str) else format_number(value)
