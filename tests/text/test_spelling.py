"""Every token of the two usual kinds of vocabulary has a spelling of its own, with its space."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_lab.text.spelling import byte_alphabet, spell


@pytest.fixture
def sentence_piece():
    """Return a tokenizer as Llama's and Gemma's: spaces are U+2581, rare characters are byte tokens."""
    names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581the", "the", "\u2581", "e", "\u2581\u2581"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    replace, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture
def byte_level():
    """Return a tokenizer as GPT-2's: a token is a sequence of bytes, each written as one character."""
    character = {byte: c for c, byte in byte_alphabet().items()}
    texts = [*(bytes([i]) for i in range(256)), b" the", "é".encode(), "\ufffd".encode(), b"\xa9\xc3", b" \xe2\x80"]
    vocabulary = {"".join(character[byte] for byte in text): i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_sentence_piece_token_keeps_its_space(sentence_piece):
    assert sentence_piece.decode([257]) == "the"  # what a page showed before
    assert [spell(sentence_piece, i) for i in (257, 258, 259, 260, 261)] == [" the", "the", " ", "e", "  "]


def test_byte_tokens_are_written_as_bytes(sentence_piece):
    assert [spell(sentence_piece, 1 + byte) for byte in (0xE2, 0x80, 0xFF)] == ["<0xE2>", "<0x80>", "<0xFF>"]
    assert spell(sentence_piece, 1 + ord("A")) == "A"


def test_parts_of_characters_are_written_as_bytes(byte_level):
    assert [spell(byte_level, i) for i in (ord("A"), ord(" "), ord("\n"))] == ["A", " ", "\n"]
    assert [spell(byte_level, i) for i in range(256, 261)] == [" the", "é", "\ufffd", "<0xA9><0xC3>", " <0xE2><0x80>"]


def test_no_two_tokens_look_alike(byte_level):
    assert len({spell(byte_level, i) for i in range(261)}) == 261
