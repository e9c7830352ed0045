"""Spell single tokens for people: with the space that they begin with, and never two of them alike as U+FFFD."""

import codecs
from functools import cache
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def spell(tokenizer: Any, token: int) -> str:
    """Return the text that a token adds to a text. Bytes that are no whole character are written as <0xE2>.

    A tokenizer drops the space of a token at the beginning of a text (SentencePiece), so the token is decoded behind
    another one. Half a character is U+FFFD when it is decoded alone, so its bytes are read from the vocabulary.
    """
    first = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    before = tokenizer.decode([token, token], clean_up_tokenization_spaces=False)
    text = before.removeprefix(first) if before.startswith(first) else first
    return spell_bytes(tokenizer, token) or text if REPLACEMENT in text else text


def spell_bytes(tokenizer: Any, token: int) -> str | None:
    """Return a token of a byte-level vocabulary; None if it is not made of bytes."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None or (name.startswith("<0x") and name.endswith(">")):
        return name
    alphabet = byte_alphabet()
    if not all(character in alphabet for character in name):
        return None
    return bytes(alphabet[character] for character in name).decode("utf-8", errors="sae_lab_hex")


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on.

    References:
        https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def as_hex(error: UnicodeError) -> tuple[str, int]:
    """Write the bytes that are no character as <0xE2>: an error handler for `bytes.decode`."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("sae_lab_hex", as_hex)
