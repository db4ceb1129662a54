"""The papers' experiments end to end, with their own architectures shrunk to two layers and random weights: no hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from omegaconf import OmegaConf

from fusechat.pipeline.steps import expand
from fusechat.tiny.chats import World, generate
from fusechat.tiny.models import make_tokenizer
from tests.conftest import composed, run_entry

TEXTS = [m["content"] for row in generate(World(0), 400, "texts") for m in row["messages"]]
SHAPES: dict[str, Any] = {
    "mistral": transformers.MistralConfig,
    "llama": transformers.LlamaConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2": transformers.Qwen2Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "mpt": transformers.MptConfig,
}
MODELS = {  # name -> architecture, tokenizer's make, vocabulary; equal vocabularies are shared, as in the originals
    "pivot": ("mistral", "llama", 400),
    "nh2_mixtral": ("mixtral", "llama", 400),
    "nh2_solar": ("llama", "llama", 400),
    "starling": ("mistral", "llama", 400),
    "internlm2_20b": ("llama", "llama", 420),
    "mixtral_8x7b": ("mixtral", "mixtral", 300),
    "qwen1_5_72b": ("qwen2", "qwen2", 500),
    "openllama_7b_v2": ("llama", "mixtral", 300),
    "mpt_7b": ("mpt", "gpt_neox", 450),
}


def shrunk(path: Path, name: str) -> Path:
    kind, make, vocab = MODELS[name]
    tokenizer = make_tokenizer(make, vocab, TEXTS)
    special = {
        "vocab_size": len(tokenizer) + 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 3,
    }  # a padded embedding
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
    }
    if kind == "mpt":
        shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}
    elif kind != "gpt_neox":
        shape["num_key_value_heads"] = 2
    extra = {"num_local_experts": 2} if kind == "mixtral" else {}
    model = transformers.AutoModelForCausalLM.from_config(SHAPES[kind](**special, **shape, **extra))
    model.save_pretrained(path / name)
    tokenizer.save_pretrained(path / name)
    return path / name


@pytest.mark.parametrize("experiment", ["fusechat_7b_varm", "fusechat_7b_v2", "fusellm_7b"])
def test_end_to_end(experiment: str, tmp_path: Path) -> None:
    rows = generate(World(0), 24, "chats")
    if experiment == "fusellm_7b":
        rows = [{"text": " ".join(m["content"] for m in row["messages"])} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pivot = shrunk(tmp_path / "models", "pivot")
    base = [
        f"experiment={experiment}",
        f"paths.root={tmp_path}",
        f"chat.path={tmp_path}/chats.jsonl",
        "chat.max_length=128",
        f"pivot.path={pivot}",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "data.global_batch=8",
        "logger=csv",
        "pivot.dtype=float32",
        "callbacks.progress_bar=false",
        "data.validation_fraction=0.1",
    ]
    for step in OmegaConf.to_container(composed("pipeline", [*base]).pipeline.steps, resolve=True):
        for name, overrides in expand(str(step)):
            source = next((o.removeprefix("source=") for o in overrides if o.startswith("source=")), None)
            path = (
                [f"source.path={shrunk(tmp_path / 'models', source)}", "source.device_map=null"]
                if source in MODELS and source != "pivot" and name == "extract"
                else []
            )
            if name == "align":
                path = [f"source.path={tmp_path / 'models' / source}"]
            run_entry(name, [*base, *overrides, *path])
    root = tmp_path / experiment
    merged = [*root.glob("merged/*"), *([root / "targets/fusellm"] if experiment == "fusellm_7b" else [])]
    assert len(merged) == 1
    transformers.AutoModelForCausalLM.from_pretrained(merged[0])
    stores = {f.parent.name: json.loads(f.read_text())["token_map"] for f in root.glob("aligned/*/manifest.json")}
    if experiment == "fusechat_7b_varm":
        assert stores == {"nh2_mixtral": "same", "nh2_solar": "same"}, "the pivot's vocabulary: nothing to align"
    else:
        assert {"ms", "mined"} & set(stores.values())
