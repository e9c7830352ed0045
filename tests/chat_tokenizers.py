"""Small tokenizers with chat templates: ChatML's, and one as Gemma's, which adds BOS and refuses a system message."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_lab.text.spelling import byte_alphabet

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
BOS = 0


def tokenizer_with(template: str | None, special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes and ` the`; `special` have the first ids, of which the first one is BOS."""
    character = {byte: c for c, byte in byte_alphabet().items()}
    names = [*special, *(character[byte] for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": list(special[1:])})
    fast.chat_template = template
    return fast


def chatml(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    return tokenizer_with(template, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def gemma() -> PreTrainedTokenizerFast:
    return tokenizer_with(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"))
