"""GGUF files as sources: what llama.cpp's own writer wrote gives what the directory gives."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from fusechat.app.errors import UserError
from fusechat.models.gguf import described, write_plain
from fusechat.models.load import load_model, load_tokenizer, model_identity
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini


def tokens_into(writer: Any, tokenizer: Any) -> None:
    """Vocabulary, merges, special tokens and template, as convert_hf_to_gguf has them."""
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    special = tokenizer.added_tokens_decoder
    writer.add_token_types([control if i in special else normal for i in range(len(vocabulary))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def write_gguf(file: Path, model: Any, tokenizer: Any, quantized: bool = False) -> None:
    """A Qwen2 in float32, or its matrices in blocks of 8 bits."""
    config, writer = model.config, gguf.GGUFWriter(file, "qwen2")
    writer.add_name("tiny")
    if quantized:
        writer.add_license("apache-2.0")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens_into(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and values.ndim == 2 else None
        values = gguf.quantize(values, kind) if kind else values
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's Qwen2, with the token that every Qwen2 has, as a directory and as two GGUF files."""
    folder = tmp_path_factory.mktemp("gguf")
    world = mini.experiment / "world/models/b"
    model = transformers.AutoModelForCausalLM.from_pretrained(world)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_gguf(folder / "model.gguf", model, tokenizer)
    write_gguf(folder / "packed.gguf", model, tokenizer, quantized=True)
    return folder


def test_extraction_of_a_file_is_that_of_the_directory(folder: Path, mini: Mini) -> None:
    for name in ("model", "model.gguf"):
        mini.run("extract", "source.name=x", f"source.path={folder}/{name}", f"output_dir={folder}/of-{name}")
    stores = [DistributionStore(folder / f"of-{name}") for name in ("model", "model.gguf")]
    assert [e["xxh3_128"] for e in stores[0].manifest["shards"]] == [
        e["xxh3_128"] for e in stores[1].manifest["shards"]
    ]
    assert stores[0].manifest["tokenizer"] == stores[1].manifest["tokenizer"]


def test_packed_weights_are_unpacked(folder: Path) -> None:
    packed, whole = load_model(f"{folder}/packed.gguf", dtype="float32"), load_model(f"{folder}/model")
    for (name, one), (other_name, other) in zip(packed.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other_name and one.dtype == torch.float32
        assert 0 <= (one - other).abs().max() <= other.abs().max() / 127, "half a step of 8 bits, and its scale's"
    assert not hasattr(packed.config, "quantization_config")
    assert not torch.equal(packed.get_input_embeddings().weight, whole.get_input_embeddings().weight)


def test_a_pivot_is_written_out_as_a_plain_directory(folder: Path, tmp_path: Path) -> None:
    write_plain(f"{folder}/packed.gguf", tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    packed = load_model(f"{folder}/packed.gguf")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), packed.parameters(), strict=True))
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    tokenizer = load_tokenizer(f"{tmp_path}/plain")
    assert tokenizer.chat_template == load_tokenizer(f"{folder}/model").chat_template
    with pytest.raises(UserError, match=r"exists already"):
        write_plain(f"{folder}/packed.gguf", tmp_path / "plain")


def test_no_file_is_trained_or_merged_into(folder: Path, mini: Mini) -> None:
    told = r"{}=.*model\.gguf is a GGUF file, .* has to be a Hugging Face directory; write one with: python -c"
    with pytest.raises(UserError, match=told.format(r"pivot\.path")):
        mini.run("train", "source=a", f"pivot.path={folder}/model.gguf", f"output_dir={folder}/of-x")
    targets = f"targets=[{folder}/model,{folder}/model.gguf]"
    with pytest.raises(UserError, match=told.format("targets")):
        mini.run("merge", targets, f"pivot.path={folder}/model", f"output_dir={folder}/of-x")
    with pytest.raises(UserError, match=told.format(r"pivot\.path")):
        mini.run("merge", targets, f"pivot.path={folder}/model.gguf", f"output_dir={folder}/of-x")


def test_a_file_is_known_by_its_content(folder: Path, tmp_path: Path) -> None:
    mark = model_identity(f"{folder}/model.gguf")
    (tmp_path / "other.gguf").write_bytes((folder / "model.gguf").read_bytes())
    assert model_identity(f"{tmp_path}/other.gguf") == mark != model_identity(f"{folder}/packed.gguf")


def test_a_file_is_evaluated(folder: Path, fresh: Mini) -> None:
    values = [fresh.run("evaluate", f"model={folder}/{name}") for name in ("model", "model.gguf")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_file_says_what_it_is(folder: Path) -> None:
    assert described(folder / "packed.gguf") == "tiny (qwen2), licence apache-2.0, quantization Q8_0"
    missing = "licence not named in the file, quantization not named in the file"
    assert described(folder / "model.gguf") == f"tiny (qwen2), {missing}"


def test_bad_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is quantized already; set source\.load_in=null"):
        load_model(f"{folder}/packed.gguf", load_in="8bit")
    with pytest.raises(UserError, match=r"^/nowhere/x\.gguf does not exist; expected a model's directory, a GGUF file"):
        load_tokenizer("/nowhere/x.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(12))
    with pytest.raises(UserError, match=r"no tokenizer at .*broken\.gguf"):
        load_tokenizer(f"{tmp_path}/broken.gguf")
    with pytest.raises(UserError, match=r"broken\.gguf is no whole GGUF file \(.*\); get it again"):
        described(tmp_path / "broken.gguf")
    (tmp_path / "cut.gguf").write_bytes((folder / "model.gguf").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.gguf is no whole GGUF file"):
        described(tmp_path / "cut.gguf")
