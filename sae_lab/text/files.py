"""Find the files that hold text: globs and folders become a list of files of one format, or a sentence says why not."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

from sae_lab.runtime.errors import SettingError
from sae_lab.text.archives import names_in
from sae_lab.text.columns import escaped
from sae_lab.text.formats import UNDERSTOOD, format_of, may_be_data, suffix_of
from sae_lab.text.saved import is_saved

SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}\..*")


class Found(NamedTuple):
    """Files of one format; `note` says what was read of folders, and what was not."""

    files: list[Path]
    format: str
    note: str = ""


def find_files(globs: Sequence[str], format: str | None = None) -> Found:
    """Return the files that match the globs, or that lie in the folders, and their format.

    A folder is searched to the bottom. Only what is understood is taken from it, without the files of a repository that
    hold no data (README.md) and, of shards called `SPLIT-00000-of-00008`, only the split train.

    Args:
        globs: globs or paths of files and folders.
        format: the format of all files, whatever their names; None goes by the names.

    Raises:
        SettingError: nothing matches, a file is not understood, or the files have several formats.
    """
    found = {g: sorted(map(Path, glob(str(Path(g).expanduser()), recursive=True))) for g in globs}  # noqa: PTH207
    files = {f for matches in found.values() for f in matches if f.is_file()}
    folders = {f for matches in found.values() for f in matches if f.is_dir()}
    if files:  # globs such as corpus/** match folders too: these are meant only where they are named
        folders = {Path(g).expanduser() for g in globs} & folders
    if not files and not folders:
        raise SettingError(f"no file matches {{paths}}={escaped([*globs])}: give globs, such as ['corpus/**/*.txt'].")
    notes = []
    for folder in sorted(folders):
        inside, note = files_in(folder, format)
        files |= set(inside)
        notes.append(note)
    listed = sorted(files)
    return Found(listed, format or common_format(listed), "; ".join(notes))


def files_in(folder: Path, format: str | None) -> tuple[list[Path], str]:
    """Return the files of a folder that are read, and a note that says which."""
    check_plain(folder)
    inside = [f for f in sorted(folder.rglob("*")) if f.is_file() and may_be_data(f.relative_to(folder))]
    data = [f for f in inside if format or format_of(f.name)]
    splits = {match["split"] if (match := SHARD.fullmatch(f.name)) else "train" for f in data}
    taken = [f for f in data if "train" not in splits or not (m := SHARD.fullmatch(f.name)) or m["split"] == "train"]
    if not taken:
        raise SettingError(f"{{paths}}=[{escaped(folder)}] has no file that is understood: {UNDERSTOOD}.")
    if "train" not in splits and len(splits) > 1:
        raise SettingError(
            f"{{paths}}=[{escaped(folder)}] has the splits {sorted(splits)} and none called train: give one, such as "
            f"{{paths}}=['{escaped(folder)}/**/{min(splits)}-*']."
        )
    left_out = [f for f in inside if f not in set(taken)]
    rest = f", not {counts(left_out)}" if left_out else ""
    return taken, f"{counts(taken)} of {folder.name}{rest}"


def check_plain(folder: Path) -> None:
    """Raise a SettingError if the folder's text is to be read in another way."""
    readme = folder / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace")[:65536] if readme.is_file() else ""
    if re.match(r"---\s*\n(.*\n)?configs:", head.replace("\r\n", "\n"), re.DOTALL):
        raise SettingError(
            f"{{paths}}=[{escaped(folder)}] has a README.md that says which files are data: "
            f"type data=hub data.path={escaped(folder)}."
        )
    if saved := sorted(f for f in folder.rglob("*") if f.is_dir() and is_saved(f)):
        raise SettingError(
            f"{{paths}}=[{escaped(folder)}] holds folders written by save_to_disk: "
            f"give them, such as {{paths}}=[{escaped(saved[0])}]."
        )


def counts(files: Iterable[Path]) -> str:
    """Return how many files there are of each suffix, as in `3 .txt and 1 .csv`."""
    counted = Counter(suffix_of(f.name) for f in files)
    return " and ".join(f"{n:,} {suffix}" for suffix, n in sorted(counted.items()))


def common_format(files: Sequence[Path], where: str = "{paths}") -> str:
    """Return the format of the files, or of the files in archives.

    Raises:
        SettingError: it is not understood, or there are several.
    """
    formats: dict[str | None, str] = {}
    for file in files:
        kind = format_of(file.name)
        formats.setdefault(archived_format(file) if kind == "archive" else kind, file.name)
    suffixes = sorted({suffix_of(f.name) for f in files})
    if None in formats:
        raise SettingError(
            f"{where} match files of types {suffixes}: understood are {UNDERSTOOD}; for other files of plain text add "
            "{format}=text, or {format}=lines for one document a line."
        )
    if len(formats) > 1:
        first = next(iter(formats.values()))
        raise SettingError(
            f"{where} match files of types {suffixes}: all files must be of one type, so give those of one, "
            f"such as '*{suffix_of(first)}'."
        )
    (format,) = formats
    assert format is not None
    return format


def archived_format(archive: Path) -> str | None:
    """Return the format of the files in an archive; `webdataset` if they are the parts of rows, as 1.txt and 1.json."""
    names = [name for name in names_in(archive) if may_be_data(name)]
    formats = {format_of(name) for name in names} - {None, "archive"}
    if len(formats) == 1:
        return formats.pop()
    stems = Counter(n.rsplit(".", 1)[0] for n in names)
    if formats and len(stems) < len(names) and set(stems.values()) == {max(stems.values())}:
        return "webdataset"
    kinds = sorted({suffix_of(n) for n in names})
    raise SettingError(
        f"{escaped(archive.name)} holds files of types {kinds}: unpack it, and give the files of one type that is "
        "understood, such as {paths}=['folder/**/*.txt']."
    )
