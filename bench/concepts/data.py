"""Small labelled data sets from the source text of Python's standard library, in the files that the benchmarks read.

    python bench/concepts/data.py outputs/concepts-data

What a character belongs to is known without a person who labels it: the standard library's own tokenizer says whether
it is in a comment, in a string, on a line that defines something, or in other code. The folder holds

    texts/train.jsonl                {"text"}: whole modules, for SAEBench's core evaluation
    probes/data/                     sae-probes: a table of data sets, and one {"prompt", "target"} file for each
    kinds/train.jsonl, test.jsonl    {"text", "label"}: four classes, for SAEBench's sparse probing
"""

import io
import json
import keyword
import random
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pandas as pd

KINDS = ("code", "comment", "string", "def")
PROBES = {"comment": "901_py_comment", "string": "902_py_string", "def": "903_py_def", "keyword": "904_py_keyword"}
"""sae-probes' names: a number, and the tag by which its table finds the file."""
CONTEXT = 240
"""Characters before the token that is probed: about 80 tokens of the bundled model, which takes 256."""
N_MODULES = 200
N_PROBE, N_TRAIN, N_TEST = 1200, 600, 150
"""Rows of a data set for sae-probes; rows of a class for SAEBench."""


Place = tuple[int, int, tokenize.TokenInfo]
"""A token, with the places of its first character and of the character after its last."""


def modules() -> Iterator[str]:
    """Yield the source of the standard library's modules in order of their names, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(file.relative_to(root).parts):
            try:
                yield file.read_text("utf-8")
            except UnicodeDecodeError:  # a few modules declare another encoding
                continue


def tokens(source: str) -> list[Place]:
    """Return the tokens of a module."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return [
        (starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1], token)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.string.strip()
    ]


def spans(places: list[Place]) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, start, end): the longest stretches of text of one kind."""
    defined = {token.start[0] for _, _, token in places if token.string in ("def", "class")}

    def kind(place: Place) -> str:
        token = place[2]
        named = {tokenize.COMMENT: "comment", tokenize.STRING: "string"}.get(token.type)
        return named or ("def" if token.start[0] in defined else "code")

    for name, group in groupby(places, kind):
        stretch = list(group)
        yield name, stretch[0][0], stretch[-1][1]


def prefixes(source: str, places: list[Place], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (kind, text): text that ends after a word of that kind."""
    for kind, start, end in spans(places):
        ends = [i for i in range(start + 6, end) if source[i - 1].isalnum() and not source[i].isalnum()]
        if ends:
            place = rng.choice(ends)
            yield kind, source[max(0, place - CONTEXT) : place]


def words(source: str, places: list[Place]) -> Iterator[tuple[str, str]]:
    """Yield ("keyword" or "name", text): text that ends after a keyword or another name."""
    for _, end, token in places:
        if token.type == tokenize.NAME and end > CONTEXT:
            yield "keyword" if keyword.iskeyword(token.string) else "name", source[end - CONTEXT : end]


def collect(rng: random.Random) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """Return the modules, texts that end in each kind or class of words, and stretches of each kind."""
    sources, ends, pieces = rng.sample(list(modules()), N_MODULES), {}, {}
    for source in sources:
        try:
            places = tokens(source)
        except (tokenize.TokenError, SyntaxError):  # a module of this interpreter that it cannot read itself
            continue
        for kind, text in (*prefixes(source, places, rng), *words(source, places)):
            ends.setdefault(kind, []).append(text)
        for kind, start, end in spans(places):
            if len(text := source[start:end].strip(" #\"'")) >= 30:
                pieces.setdefault(kind, []).append(text[:CONTEXT])
    return sources, ends, pieces


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_probes(folder: Path, ends: dict[str, list[str]], rng: random.Random) -> None:
    """Write one balanced data set for each of PROBES, and the table by which sae-probes finds them."""
    (folder / "cleaned_data").mkdir(parents=True, exist_ok=True)
    table = []
    for positive, name in PROBES.items():
        negative = "name" if positive == "keyword" else "code"
        rows = [(text, 1) for text in rng.sample(ends[positive], N_PROBE // 2)]
        rows += [(text, 0) for text in rng.sample(ends[negative], N_PROBE // 2)]
        rng.shuffle(rows)
        file = folder / "cleaned_data" / f"{name}.csv.zst"
        pd.DataFrame(rows, columns=["prompt", "target"]).to_csv(file, index=False)
        tag, saved = name.split("_", 1)[1], f"cleaned_data/{name}.csv"
        table.append({"Dataset Tag": tag, "Dataset save name": saved, "Data type": "Binary Classification"})
    pd.DataFrame(table).to_csv(folder / "probing_datasets_MASTER.csv.zst", index=False)


def main(folder: Path) -> None:
    rng = random.Random(0)
    sources, ends, pieces = collect(rng)
    write_jsonl(folder / "texts" / "train.jsonl", [{"text": source} for source in sources if len(source) > 1000])
    write_probes(folder / "probes" / "data", ends, rng)
    drawn = {kind: rng.sample(pieces[kind], N_TRAIN + N_TEST) for kind in KINDS}
    for split, part in {"train": slice(N_TRAIN), "test": slice(N_TRAIN, None)}.items():
        rows = [{"text": text, "label": i} for i, kind in enumerate(KINDS) for text in drawn[kind][part]]
        write_jsonl(folder / "kinds" / f"{split}.jsonl", rows)
    counts = {kind: len(texts) for kind, texts in {**ends, **{f"{k} (text)": v for k, v in pieces.items()}}.items()}
    print(f"{folder}: {len(sources)} modules, drawn from {counts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
