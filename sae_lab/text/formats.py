"""Which format the name of a file tells: the suffixes that are understood."""

from pathlib import Path, PurePath

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
# What a repository of the hub holds besides its data.
NO_DATA = {"readme.md", "license.txt", "license.md", "config.json", "dataset_info.json", "dataset_infos.json"}
UNDERSTOOD = (
    f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSED)}, {', '.join(ARCHIVES)}, and, with data=tokens, "
    ".bin and .npy"
)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def format_of(name: str) -> str | None:
    """Return the format that a file's name tells; None if it is not understood."""
    if is_archive(name):
        return "archive"
    plain = PurePath(name.lower())
    return FORMATS.get(plain.with_suffix("").suffix if plain.suffix in COMPRESSED else plain.suffix)


def suffix_of(name: str) -> str:
    """Return the end of a file's name that tells its format, such as .csv.gz."""
    suffixes = Path(name.lower()).suffixes
    several = len(suffixes) > 1 and suffixes[-1] in COMPRESSED
    return "".join(suffixes[-2:] if several else suffixes[-1:]) or "without suffix"


def may_be_data(path: str | PurePath) -> bool:
    """Whether a file of a folder or archive may hold data: it is not hidden, and no README or license."""
    parts = PurePath(path).parts
    return not any(part.startswith((".", "_")) for part in parts) and parts[-1].lower() not in NO_DATA
