"""Choose what a data set is read as: text, chats or token ids, and from which columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sae_lab.runtime.errors import SettingError
from sae_lab.text.columns import (
    Column,
    columns_of,
    escaped,
    excerpt,
    named_columns,
    plain_text,
    question,
    usual_names,
    values_at,
)
from sae_lab.text.contents import Content
from sae_lab.text.messages import TURNS, is_messages

ChatSetting = bool | Literal["auto"]
USUAL_CHATS = ("messages", "conversations", "conversation")
MASK_NAME = "attention_mask"
LOSS_MASKS = {"labels", "loss_mask", "completion_mask", "assistant_masks"}


def choose_content(
    features: Mapping[str, Any],
    named: str | Sequence[str] | None,
    rows: Sequence[Mapping[str, Any]],
    chat: ChatSetting = "auto",
) -> Content:
    """Return the columns that hold the documents, and the kind of these.

    Text is taken as `plain_text` does. With chat="auto" a column of messages is taken where nothing is plainly text.

    Args:
        features: the features of the data set.
        named: the user's choice, as paths such as `body`, `data.text`, `messages` or `input_ids`.
        rows: the first rows.
        chat: True takes messages before text, and reads pairs such as instruction and output as a user's and an
            assistant's; False takes no messages.

    Raises:
        SettingError: nothing is plainly the text or a chat, or `named` is neither these nor token ids.
    """
    columns = {column.path: column for column in columns_of(features)}
    tokens = {column.path: column for column in columns.values() if is_ids(column)}
    chats = {} if chat is False else {column.path: column for column in chat_columns(features, rows)}
    others = [*chats, *(name for name in tokens if name.rpartition(".")[2] in ("input_ids", "tokens"))]
    if named is not None:
        names = [named] if isinstance(named, str) else [*named]
        return named_content(names, columns, chats, tokens, pair=chat is True)
    usual_chat = next((chats[name] for name in USUAL_CHATS if name in chats), None)
    found = usual_chat or (next(iter(chats.values())) if len(chats) == 1 else None)
    if chat is True:
        if found:
            return Content("chat", (found,))
        if pair := usual_names([path for path, column in columns.items() if column.is_text], 2):
            return Content("chat", tuple(columns[name] for name in pair))
    elif text := plain_text(features, rows):
        return Content("text", text)
    elif found:
        return Content("chat", (found,))
    sentence = question([*columns.values()], rows, others)
    raise SettingError(sentence.replace("is plainly the text", "is plainly a chat", 1) if chat is True else sentence)


def named_content(
    names: Sequence[str],
    columns: Mapping[str, Column],
    chats: Mapping[str, Column],
    tokens: Mapping[str, Column],
    pair: bool,
) -> Content:
    """Return the content of the columns that the user names; with `pair` several are a question and its answer."""
    if len(names) == 1 and names[0] in chats:
        return Content("chat", (chats[names[0]],))
    if len(names) == 1 and names[0] in tokens:
        ids = tokens[names[0]]
        masks = [c for c in columns.values() if c.steps == (*ids.steps[:-2], MASK_NAME, None)]
        return Content("tokens", (ids, *masks), tuple(c.path for c in columns.values() if c.path in LOSS_MASKS))
    check_one_list(columns, names)
    chosen = named_columns(columns, names, [*chats, *tokens])
    if pair and len(names) == 1:
        raise SettingError(f"{{column}}={escaped(names[0])} is no list of messages: name one, or type {{chat}}=false.")
    return Content("chat" if pair else "text", chosen)


def check_one_list(columns: Mapping[str, Column], names: Sequence[str]) -> None:
    """Raise a SettingError if a named column holds whole numbers in lists of lists."""
    for name in names:
        column = columns.get(name)
        if column and are_whole(column) and column.steps.count(None) > 1:
            raise SettingError(
                f"{{column}}={escaped(name)} holds a list of lists of {column.kind} in each row: one list of token ids "
                "is expected, so write each inner list as a row of its own."
            )


def is_ids(column: Column) -> bool:
    """Whether a column holds lists of whole numbers."""
    return column.steps[-1] is None and column.steps.count(None) == 1 and are_whole(column)


def are_whole(column: Column) -> bool:
    return column.kind.lstrip("u").startswith("int")


def chat_columns(
    feature: Any, rows: Sequence[Mapping[str, Any]], path: str = "", steps: tuple[str | None, ...] = ()
) -> Iterator[Column]:
    """Yield the columns that hold a list of messages in each row, also inside structs."""
    import datasets

    is_list = datasets.List | datasets.LargeList
    if isinstance(feature, is_list) and isinstance(feature.feature, Mapping) and has_turns(feature.feature):
        yield Column(path, steps, "messages")
    elif isinstance(feature, Mapping):
        if steps and has_turns(feature) and all(isinstance(inner, is_list) for inner in feature.values()):
            yield Column(path, steps, "messages")
            return
        for name, inner in feature.items():
            yield from chat_columns(inner, rows, f"{path}.{name}" if path else name, (*steps, name))
    elif isinstance(feature, datasets.Json):  # values of several types, such as contents with and without parts
        values = [value for row in rows for value in values_at(row, steps) if value]
        if (values or not rows) and all(map(is_messages, values)):
            yield Column(path, steps, "messages")


def has_turns(names: Mapping[str, Any]) -> bool:
    return any(set(keys) <= set(names) for keys in TURNS)


def described(content: Content, n_documents: str, first: str) -> str:
    """Return the line that tells the user which documents are read."""
    names = " + ".join(column.path for column in content.columns)
    kind = {"text": "text", "chat": "chats", "tokens": "token ids, taken as they are"}[content.kind]
    ignored = f"; ignored: {', '.join(content.ignored)}" if content.ignored else ""
    return f"{kind}: column {names} of {n_documents} documents; the first begins {excerpt(first, 80)!r}{ignored}"
