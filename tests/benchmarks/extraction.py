"""Extraction: cost over the bare forward pass, memory against the number of chats, and what rendering costs over
tokenizing.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from fusechat.chats.render import ChatRenderer
from fusechat.extract.extractor import Extractor
from fusechat.extract.kinds import Keep
from fusechat.tiny.chats import World, generate
from fusechat.tiny.models import make_tokenizer
from tests.benchmarks.measure import table

SENTENCE = "The ruler of the old harbour town counted 415 ships, and every one of them carried salt, bread or iron. "


def chats(count: int) -> list[list[dict[str, str]]]:
    """Multi-turn chats of a few hundred tokens."""
    turns = [
        ("user", "Tell me about it."),
        ("assistant", SENTENCE * 6),
        ("user", "And then?"),
        ("assistant", SENTENCE * 5),
    ]
    return [[{"role": role, "content": f"{i} {text}"} for role, text in turns] for i in range(count)]


def best(work: object, repeats: int = 7) -> float:
    """Smallest CPU time of one thread."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()  # type: ignore[operator]
        seconds.append(time.process_time() - start)
    return min(seconds)


def overhead() -> list[list[object]]:
    """A Llama-shaped model of about 50M parameters, V 32,000: extraction of a batch against its forward pass."""
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1408,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokenizer = make_tokenizer(
        "llama", 600, [m["content"] for row in generate(World(0), 500, "x") for m in row["messages"]]
    )  # type: ignore[index,union-attr]
    rendered = ChatRenderer(tokenizer)(chats(4))
    extractor = Extractor(model, "top_k", Keep(32_000))
    ids = torch.zeros(4, max(len(r.input_ids) for r in rendered), dtype=torch.long)

    @torch.inference_mode()
    def bare() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    whole, forward = best(lambda: extractor(rendered)), best(bare)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return [[f"{parameters:.0f}M parameters, 4 x {ids.shape[1]} tokens", forward, whole, whole / forward - 1]]


def rendering() -> list[list[object]]:
    """Rendering, tokenizing and masking against the fast tokenizer alone on the same texts."""
    many = chats(300)
    tokenizer = make_tokenizer("qwen2", 750, [m["content"] for chat in many for m in chat])
    renderer = ChatRenderer(tokenizer)
    texts = [r.text for r in renderer(many)]
    alone, whole = best(lambda: tokenizer(texts, add_special_tokens=False)), best(lambda: renderer(many))
    return [["300 chats", alone, whole, whole / alone]]


def memory() -> list[list[object]]:
    """Peak memory of the command over 1,000 and 10,000 chats."""
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = make_tokenizer("llama", 400, [SENTENCE])
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
        for count in (1000, 10_000):
            (root / "chats.jsonl").write_text("".join(json.dumps({"messages": c[:2]}) + "\n" for c in chats(count)))
            arguments = [
                f"pivot.path={root}/model",
                "source.name=m",
                f"source.path={root}/model",
                f"chat.path={root}/chats.jsonl",
            ]
            arguments += [
                f"output_dir={root}/out{count}",
                "extract.rows_per_shard=250",
                "logger=none",
                f"paths.root={root}/runs",
            ]
            code = f"import sys; sys.argv = ['x', *{arguments!r}]; from fusechat.extract.__main__ import main; main()"
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            rows.append([f"{count:,} chats", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024])
    return rows


def main() -> None:
    """Prints the tables."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    table(
        "extraction over the bare forward pass, one thread",
        ["model and batch", "forward CPU s", "extraction CPU s", "overhead"],
        overhead(),
    )
    table(
        "rendering over tokenizing, one thread",
        ["what", "tokenizer alone CPU s", "rendered and masked CPU s", "ratio"],
        rendering(),
    )
    table("peak memory of extraction", ["what", "MB"], memory())


if __name__ == "__main__":
    main()
