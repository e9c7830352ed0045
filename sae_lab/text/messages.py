"""Lists of messages as data sets write them, as {"role", "content"}."""

from collections.abc import Mapping
from typing import Any

from sae_lab.text.columns import excerpt

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool"), "tool"),
}
"""Roles as data sets write them → as templates do. Others stay as they are: a template may know them."""
TURNS = (("role", "content"), ("from", "value"))  # keys of messages: those of OpenAI and of ShareGPT


def messages_of(value: Any) -> tuple[dict[str, str], ...]:
    """Return a list of messages of either form as {"role", "content"}. None is no messages.

    Raises:
        TypeError: it is no list of messages; the message says what is wrong.
    """
    if isinstance(value, str):
        raise TypeError(f"{excerpt(value, 30)!r} is no list of messages")
    if isinstance(value, Mapping):  # how `datasets` used to store lists of structs
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return tuple(message_of(turn, n) for n, turn in enumerate(value or (), 1))


def message_of(turn: Any, n: int) -> dict[str, str]:
    for role_key, content_key in TURNS:
        if isinstance(turn, Mapping) and role_key in turn and content_key in turn:
            role, content = turn[role_key], turn[content_key]
            if not isinstance(role, str) or not role:
                raise TypeError(f"message {n} has the role {role!r}")
            return {"role": ROLES.get(role.lower(), role.lower()), "content": content_of(content, n)}
    raise TypeError(f"message {n} is {excerpt(turn, 30)!r}, without a role")


def content_of(content: Any, n: int) -> str:
    """Return the text of a message: a string, or a list of parts such as {"type": "text", "text": "..."}, joined."""
    if isinstance(content, str):
        return content
    if content is None:  # a call of a tool
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise TypeError(f"message {n} has {excerpt(content, 30)!r} in the place of text")


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, Mapping) and any(set(keys) <= set(turn) for keys in TURNS) for turn in value)
    )
