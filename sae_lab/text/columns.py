"""The columns of a data set, and those that hold text: with a usual name, the only one of strings, or named."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sae_lab.runtime.errors import SettingError, UserError, first_line
from sae_lab.runtime.plain_text import for_terminal

# Usual names of the text columns, in order of preference. Several columns are joined by blank lines.
USUAL: tuple[tuple[str, ...], ...] = (
    *(("text",), ("content",), ("document",), ("body",), ("markdown",)),
    *(("instruction", "input", "output"), ("instruction", "output"), ("instruction", "response")),
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")),
    ("problem", "solution"),
)
CHATS_OR_TOKENS = {"messages", "conversations", "conversation", "input_ids", "tokens"}
STRINGS = {"string", "large_string", "string_view"}
SAMPLE = 20  # rows that are looked at
LISTED = 20  # columns that an error message lists

# Values that are no text, whatever the name of their column.
REFERENCES = {
    "URLs": r"([a-z][a-z0-9+.-]*://|www\.)\S+",
    "UUIDs": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "hashes": r"(\w+:)?[0-9a-f]{16,}",
}
# Values that may be text, if a name says so.
DOUBTFUL = REFERENCES | {
    "numbers": r"(?=.*\d)[\d\s.,:;/+%TZ-]+",
    "ids": r"[!-~]{0,99}[\d_/\\@:][!-~]{0,99}",
    "JSON": r"\s*(\[.*\]|\{.*\})\s*",
}
WORD = r"[!-~]{1,40}"


class Column(NamedTuple):
    """A value inside a row: `path` as the user types it; `steps` to it (a key, or None for each part of a list)."""

    path: str
    steps: tuple[str | None, ...]
    kind: str

    @property
    def is_text(self) -> bool:
        return self.kind in STRINGS

    def __str__(self) -> str:
        return ("string" if self.is_text else self.kind) + " in a list" * (None in self.steps)

    def values(self, rows: Sequence[Any]) -> list[Any]:
        """Return the values of the rows that are not missing or empty."""
        return [v for row in rows for v in values_at(row, self.steps) if v not in (None, "")]


def values_at(value: Any, steps: Sequence[str | None]) -> Iterator[Any]:
    """Yield the values at the end of the steps: one, or one for each part of the lists on the way."""
    if value is None or not steps:
        yield value
    elif steps[0] is None:
        if isinstance(value, str):
            raise TypeError("but a string in the place of a list")
        for part in value:
            yield from values_at(part, steps[1:])
    else:
        yield from values_at(value.get(steps[0]), steps[1:])


def text_of(row: Mapping[str, Any], columns: Sequence[Column], where: str = "a row of the data") -> str:
    """Return the text of a row: its non-empty columns, joined by blank lines; the parts of a list, by line breaks.

    Raises:
        UserError: a value is neither a string nor a number; `where` names the row.
    """
    try:
        parts = ["\n".join(map(as_text, column.values([row]))) for column in columns]
    except (TypeError, AttributeError) as e:
        paths = " and ".join(column.path for column in columns)
        raise UserError(
            f"{where} has no text at {paths} ({first_line(e)}): leave it out, or give another data.column."
        ) from e
    return "\n\n".join(filter(None, parts))


def as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"but {excerpt(value, 30)!r}")


def columns_of(feature: Any, path: str = "", steps: tuple[str | None, ...] = ()) -> Iterator[Column]:
    """Yield the columns of a data set's features, down to the values inside structs and lists."""
    import datasets

    if isinstance(feature, datasets.Translation | datasets.TranslationVariableLanguages):
        feature = feature.flatten()
    if isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from columns_of(inner, f"{path}.{name}" if path else name, (*steps, name))
    elif isinstance(feature, datasets.List | datasets.LargeList):
        yield from columns_of(feature.feature, path, (*steps, None))
    else:
        plain = isinstance(feature, datasets.Value)
        yield Column(path, steps, feature.dtype if plain else type(feature).__name__)


def features_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the features of rows that come without: types as `datasets` infers them from JSON."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: feature_of([row.get(name) for row in rows]) for name in names}


def feature_of(values: Sequence[Any]) -> Any:
    """Return the feature of a column: a timestamp if all strings are such; string for strings and numbers."""
    import datasets
    import pyarrow as pa

    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        nested = any(isinstance(value, dict | list) for value in values)
        return datasets.Json() if nested else datasets.Value("string")
    if pa.types.is_string(array.type) and array.null_count < len(array):
        with suppress(pa.ArrowInvalid):
            array = array.cast(pa.timestamp("s"))
    return datasets.Features.from_arrow_schema(pa.schema({"x": array.type}))["x"]


def plain_text(features: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return the columns that are plainly the text; none if nothing is.

    A column is taken by itself if it has a usual name, or if it is the only one of strings and nothing beside it could
    be the text: no list, no struct, no bytes, no chat and no token ids. If something could, a usual name does not help
    a column of ids, numbers or single words.

    Args:
        features: the features of the data set.
        rows: the first rows. If 9 in 10 values are URLs, hashes, ids or the like, the column is not taken by itself.
    """
    columns = {column.path: column for column in columns_of(features)}
    strings = {path for path, column in columns.items() if column.is_text and len(column.steps) == 1}
    usual = usual_names(strings)
    others = any(may_be_text(column) for path, column in columns.items() if path not in strings)
    no_text = DOUBTFUL if others else REFERENCES
    if usual and not all(kind_of_values(columns[name].values(rows), no_text) for name in usual):
        return tuple(columns[name] for name in usual)
    if not usual and len(strings) == 1 and not others:
        (only,) = strings
        if only not in CHATS_OR_TOKENS and not kind_of_values(columns[only].values(rows), DOUBTFUL):
            return (columns[only],)
    return ()


def usual_names(strings: Collection[str], n: int = 1) -> tuple[str, ...]:
    """Return the first usual names, at least n together, that are all among the columns of strings."""
    return next((names for names in USUAL if len(names) >= n and set(names) <= set(strings)), ())


def named_columns(
    columns: Mapping[str, Column], names: Sequence[str], others: Collection[str] = ()
) -> tuple[Column, ...]:
    """Return the columns of these paths. `[]` after a list's name may be left out.

    Raises:
        SettingError: one is not there, or is no text. The sentence also lists `others`, chats and token ids.
    """
    chosen = [columns.get(name, columns.get(name.replace("[]", ""))) for name in names]
    found = tuple(column for column in chosen if column is not None and (column.is_text or column.kind == "null"))
    if not found or len(found) < len(chosen):
        text = [*(path for path, column in columns.items() if column.is_text), *others]
        given = names[0] if len(names) == 1 else list(names)
        raise SettingError(
            f"{{column}}={escaped(given)} is not a text column of the data: it must be among {escaped(text)}."
        )
    return found


def may_be_text(column: Column) -> bool:
    """Whether the text could be in this column instead of the only one of strings."""
    return len(column.steps) > 1 or column.path in CHATS_OR_TOKENS or column.kind in ("binary", "large_binary", "Json")


def kind_of_values(values: Sequence[Any], kinds: Mapping[str, str]) -> str | None:
    """Return what the strings are, if 9 in 10 of them are URLs, ids or the like; None for text and for no strings."""
    strings = [value for value in values if isinstance(value, str)]

    def are(pattern: str) -> bool:
        return sum(bool(re.fullmatch(pattern, s, re.IGNORECASE | re.DOTALL)) for s in strings) >= 0.9 * len(strings)

    for name, pattern in kinds.items():
        if strings and are(pattern):
            return name
    return "single words" if kinds is DOUBTFUL and len(strings) >= 10 and are(WORD) else None


def question(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], others: Collection[str] = ()) -> str:
    """Return the sentence that lists the columns, with types and samples, and says what to type.

    Args:
        others: columns that are no text and can be named: chats and token ids.
    """
    lengths: dict[str, int] = {}
    listed = []
    for column in columns:
        values = column.values(rows)
        kind = kind_of_values(values, DOUBTFUL)
        if column.is_text and values and not kind:
            lengths[column.path] = max(map(len, values))
        sample = f", {excerpt(values[0], 30)!r}" if values else ""
        listed.append(f"{column.path} ({column}{f' of {kind}' if kind else ''}{sample})")
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    name = max(lengths, key=lambda path: lengths[path], default=next(iter(others), "NAME"))
    typed = f"{{column}}={escaped(name)}" if re.fullmatch(r"[\w./-]+", name) else f"""'{{column}}="{escaped(name)}"'"""
    answer = f"if one of them is, type {typed}" if name == "NAME" else f"type {{column}}=NAME, such as {typed}"
    return f"no column of the data is plainly the text: {escaped('; '.join(listed[:LISTED]))}{more}: {answer}."


def excerpt(value: Any, n: int) -> str:
    """Return the first n characters of a value as plain text in one line."""
    text = " ".join(for_terminal(str(value)[: 4 * n]).split())
    return text[:n] + "…" * (len(text) > n or len(str(value)) > 4 * n)


def escaped(value: Any) -> str:
    """Return the value as it stands in the sentence of a SettingError, where braces mean keys."""
    return str(value).replace("{", "{{").replace("}", "}}")
