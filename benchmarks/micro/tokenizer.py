"""The micro models' tokenizer: bytes, so that any text comes back unchanged, and whole tokens for the micro world's words."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

WORDS = (  # ordinary tokens: they survive decoding without special tokens
    *("<think>", "</think>", "hint: ", "```python", "```", "def f(xs):", "    ", '"""', ", first ", ", then "),
    *("double", "square", "negate", "keep even", "keep odd", "keep above ", "keep below ", "add ", "subtract "),
    *("sort", "sort down", "reverse", "drop first", "drop last", "sum", "count", "return xs"),
    *("xs = ", "[x", "[-x", " * ", " + ", " - ", " for x in xs", " if x", " % 2 == ", " > ", " < "),
    *("sorted(xs", ", reverse=True", "xs[::-1]", "xs[1:]", "xs[:-1]", "sum(xs)", "len(xs)"),
)  # fmt: skip


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, from nothing but this file."""
    special = [PAD, END, USER, ASSISTANT, SYSTEM]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )
