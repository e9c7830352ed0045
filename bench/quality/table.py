"""Print a Markdown table of results.csv: means over seeds, and how far each system is behind the best of ours."""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

OURS = "SAE Lab"
FAMILIES = {"topk": "TopK", "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "jumprelu": "JumpReLU"}
COLUMNS = {"fvu": ".4f", "l0": ".2f", "fvu_trained": ".4f", "l0_trained": ".2f", "dead": ".3f", "ce_degradation": ".3f"}


def means(file: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """Return the mean of each column over seeds, by (family, system, rate, settings)."""
    groups = defaultdict(list)
    with file.open() as f:
        for row in csv.DictReader(f):
            groups[row["family"], row["system"], row["rate"], row["settings"]].append(row)
    return {
        key: {column: mean(float(row[column]) for row in rows) for column in COLUMNS} | {"seeds": len(rows)}
        for key, rows in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    table = means(parser.parse_args().csv)
    print("| | system | rate | settings | seeds | fvu | L0 | fvu, training rule | L0 | dead | ce_degradation |")
    print("|---" * 11 + "|")
    for family, title in FAMILIES.items():
        rows = {key: row for key, row in table.items() if key[0] == family}
        for (_, system, rate, settings), row in sorted(rows.items(), key=lambda item: item[1]["fvu_trained"]):
            name = f"**{system}**" if system == OURS else system
            cells = [title, name, rate, settings, str(row["seeds"]), *(f"{row[c]:{f}}" for c, f in COLUMNS.items())]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
