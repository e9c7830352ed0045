"""Chats as text, by the tokenizer's own chat template."""

import re
from functools import cached_property
from typing import Any

from sae_lab.runtime.errors import first_line
from sae_lab.runtime.files import digest_of_json
from sae_lab.text.contents import MARK, Chat, Templated
from sae_lab.text.notes import Note

TODAY = {"%d": "26", "%e": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday"}
"""The date that templates see, because a text must not depend on the day it is read: that of Llama 3.1's template."""


class SpecialStrings:
    """The strings of a tokenizer's special tokens, as they may occur in text.

    Other tokens that were added to a tokenizer, such as <think>, are matched in every text.
    """

    def __init__(self, tokenizer: Any):
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.all = sorted({str(token) for token in added if token.special and len(str(token)) > 1}, key=len)[::-1]
        self.pattern = re.compile("|".join(map(re.escape, self.all)) or r"(?!)")

    def first_in(self, text: str) -> str:
        """Return the first such string in a text; empty if there is none."""
        found = self.pattern.search(text)
        return found[0] if found else ""

    def broken_in(self, text: str) -> str:
        """Return the text with MARK inside every such string, so that none is left."""
        text = text.replace(MARK, "")
        while self.pattern.search(text):
            text = self.pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text

    def end_of_piece(self, text: str, start: int, end: int) -> int:
        """Return where to end a piece of text[start:], near `end`, so that no such string is cut."""
        around = slice(max(start, end - len(self.all[0])), end + len(self.all[0])) if self.all else slice(0)
        for found in self.pattern.finditer(text[around]):
            first, after = found.start() + around.start, found.end() + around.start
            if first < end < after:
                return first if first > start else after
        return end


class ChatTemplate:
    """A tokenizer's chat template. The ids of what it renders, special tokens parsed, are those of the template itself.

    Strings of special tokens inside messages stay text. A system message that the template refuses is put before the
    first message of the user.
    """

    def __init__(self, tokenizer: Any, special: SpecialStrings):
        self.tokenizer, self.special = tokenizer, special

    @property
    def exists(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def template(self) -> str:
        """The template, which gets TODAY for the date."""
        template = self.tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return template
        date = "".join(f"|replace('{code}', '{value}')" for code, value in TODAY.items())
        return f"{{%- macro strftime_now(format) %}}{{{{ format{date} }}}}{{% endmacro %}}{template}"

    @cached_property
    def digest(self) -> str:
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return digest_of_json([self.template, special])

    def render(self, chat: Chat) -> tuple[Templated, Note | None]:
        """Return the text of a chat, empty if it cannot be rendered, and what there is to say of it."""
        if chat.problem or not chat.messages:
            return Templated(), Note("skipped", chat.problem) if chat.problem else None
        inside = next(filter(None, (self.special.first_in(m["content"]) for m in chat.messages)), "")
        broken = self.special.broken_in if inside else str
        messages = [{**message, "content": broken(message["content"])} for message in chat.messages]
        note = Note("content", inside) if inside else None
        try:
            return self._apply(messages), note
        except Exception as e:  # templates raise what they like
            if messages[0]["role"] != "system" or len(messages) < 2:
                return Templated(), Note("skipped", f"the chat template refuses it ({first_line(e)})")
        try:
            return self._apply(with_system_in_user(messages)), note or Note("system")
        except Exception as e:
            return Templated(), Note("skipped", f"the chat template refuses it ({first_line(e)})")

    def _apply(self, messages: list[dict[str, str]]) -> Templated:
        return Templated(self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False))


def with_system_in_user(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the messages without the system's, which is put before the next one."""
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
