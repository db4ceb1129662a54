"""The tiny LLMs: four architectures, four tokenizers, four chat templates, trained from scratch on answers only."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer

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
SPECIAL = {
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
    names = [special[key] for key in ("bos_token", "eos_token") if key in special] + [
        "<unk>",
        "<pad>",
        *special["extra"],
    ]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind in ("gpt_neox", "qwen2"):
        tokenizer = Tokenizer(token_models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits: list[Any] = [pre_tokenizers.Split(Regex(r"\d"), "isolated")] if kind == "qwen2" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=names,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(token_models.BPE(byte_fallback=True, unk_token="<unk>"))
        space = pre_tokenizers.Metaspace(prepend_scheme="never")
        punctuation = pre_tokenizers.Punctuation() if kind == "mixtral" else None
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([punctuation, space]) if punctuation else space
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=names + alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if kind in ("llama", "mixtral"):  # byte-fallback tokens are ordinary tokens, only their ids were to be reserved
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in alphabet]
        tokenizer = Tokenizer.from_str(json.dumps(content))
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


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """Endless padded batches of tokenized chats; labels are -100 outside the answers."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], renderer: ChatRenderer, batch_size: int, seed: str, pad: int
    ) -> None:
        self.rendered = renderer([row["messages"] for row in rows])
        self.batch_size, self.seed, self.pad = batch_size, seed, pad

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = random.Random(self.seed)
        while True:
            order = rng.sample(self.rendered, len(self.rendered))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield self._pad(order[start : start + self.batch_size])

    def _pad(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        ids, mask = pad([row.input_ids for row in rows], self.pad)
        labels, _ = pad([np.where(row.assistant_mask, row.input_ids, -100) for row in rows], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Pretraining(lightning.LightningModule):
    """Plain answers-only training of a tiny model with AdamW, cosine schedule and a short warm-up."""

    def __init__(self, model: Any, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model.train(), lr, steps

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross entropy of the answers' tokens."""
        loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW at ``lr``."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, self.steps // 20, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(data: Batches) -> DataLoader[dict[str, torch.Tensor]]:
    """A DataLoader over ready batches."""
    return DataLoader(data, batch_size=None)
