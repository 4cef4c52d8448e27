"""A small random model with a byte tokenizer and a chat template, made on the spot: the double for code that needs tensors."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from harness.models.hf import HFModel

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    "<think>",
    "</think>",
    *(f"<word{i}>" for i in range(39)),
]  # 300 tokens in all with the 256 bytes and 2 more
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a byte, and a few longer ones; pad and end differ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.add_tokens(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def tiny_network(
    seed: int = 0, rows: int = 320, scale: float = 0.2, **config: object
) -> Qwen3ForCausalLM:
    """Two layers, width 32; the head has more rows than the tokenizer has tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=rows,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=512,
                initializer_range=scale,
                tie_word_embeddings=False,
                **config,
            )
        ).eval()


@cache
def tiny_path(seed: int = 0, rows: int = 320) -> Path:
    """A checkpoint folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return HFModel(tiny_network(seed, rows), tiny_tokenizer()).save(folder / "model")


def tiny_model(seed: int = 0, rows: int = 320) -> HFModel:
    """A fresh model, free to be trained."""
    return HFModel.load(tiny_path(seed, rows), device="cpu", name=f"tiny-{seed}")
