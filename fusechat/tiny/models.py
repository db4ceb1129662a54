"""The tiny LLMs: four architectures, four tokenizers, four chat templates, trained from scratch on answers only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "gpt_neox": "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}<|endoftext|>"
    "{% else %}Human: {{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "qwen2": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mixtral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"bos_token": "<s>", "eos_token": "<|end|>", "extra": ["<|user|>", "<|assistant|>", "<|system|>"]},
    "gpt_neox": {"eos_token": "<|endoftext|>", "extra": []},
    "qwen2": {"eos_token": "<|im_end|>", "extra": ["<|im_start|>"]},
    "mixtral": {"bos_token": "<s>", "eos_token": "</s>", "extra": ["[INST]", "[/INST]"]},
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "gpt_neox": transformers.GPTNeoXConfig,
    "qwen2": transformers.Qwen2Config,
    "mixtral": transformers.MixtralConfig,
}


def make_tokenizer(kind: str, vocab_size: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's own make, trained on ``texts``, with its chat template."""
    special = SPECIAL[kind]
    known = [special[key] for key in ("bos_token", "eos_token") if key in special]
    names = [*known, "<unk>", "<pad>", *special["extra"]]
    build = _byte_level if kind in ("gpt_neox", "qwen2") else _byte_fallback
    tokenizer = build(kind, vocab_size, names, texts)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=special["eos_token"],
        bos_token=special.get("bos_token"),
        additional_special_tokens=special["extra"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATES[kind]
    return fast


def _byte_level(kind: str, vocab_size: int, names: list[str], texts: Sequence[str]) -> Tokenizer:
    """BPE over bytes, GPT-2's way; qwen2 keeps digits apart and normalises."""
    tokenizer = Tokenizer(token_models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits: list[Any] = [pre_tokenizers.Split(Regex(r"\d"), "isolated")] if kind == "qwen2" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": names, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return tokenizer


def _byte_fallback(kind: str, vocab_size: int, names: list[str], texts: Sequence[str]) -> Tokenizer:
    """BPE over characters with bytes as a last resort, SentencePiece's way; mixtral keeps punctuation apart."""
    tokenizer = Tokenizer(token_models.BPE(byte_fallback=True, unk_token="<unk>"))
    space = pre_tokenizers.Metaspace(prepend_scheme="never")
    apart: Any = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), space])
    tokenizer.pre_tokenizer = apart if kind == "mixtral" else space
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=names + alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())  # the bytes are ordinary tokens, only their ids were to be reserved
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in alphabet]
    return Tokenizer.from_str(json.dumps(content))


def make_model(kind: str, tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int) -> Any:
    """A randomly initialised model of the family, about 1M parameters at width 128 and 3 layers."""
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": width * 3,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": kind == "qwen2",
    }
    if kind in ("llama", "qwen2", "mixtral"):
        options["num_key_value_heads"] = heads // 2
    if kind == "mixtral":
        options |= {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": width}
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](**options), dtype=torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
