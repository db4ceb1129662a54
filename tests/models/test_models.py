"""Checkpoints: streamed writing equals safetensors' own, .bin files without running code, directories whole or not at
all.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusechat.app.errors import UserError
from fusechat.app.outputs import whole_directory
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.heads import chunk_rows
from fusechat.models.load import load_model
from fusechat.models.shards import CheckpointWriter, bytes_of


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(7, 5),
        "b": torch.randn(3).bfloat16(),
        "c": torch.arange(4),
        "d": torch.tensor(2.5),
        "e": torch.randn(2, 3, 4).half(),
    }


@pytest.mark.parametrize("limit", [10**6, 100])
def test_streamed_shards_read_back(limit: int, tmp_path: Path) -> None:
    data = tensors()
    writer = CheckpointWriter(tmp_path, {n: (tuple(t.shape), t.dtype) for n, t in data.items()}, limit)
    for name, tensor in data.items():
        if name == "a":
            writer.write(name, tensor[:3])
            writer.write(name, tensor[3:])
        else:
            writer.write(name, tensor)
    files = writer.close()
    assert (len(files) > 1) == (limit == 100)
    again = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in data.items())
    lazy = LazyCheckpoint(tmp_path)
    assert all(torch.equal(lazy.tensor(n), t) for n, t in data.items())


def test_bin_checkpoints_are_read_but_never_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(LazyCheckpoint(tmp_path).tensor("a"), torch.ones(2))

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read as tensors \(Weights only load failed"):
        LazyCheckpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_missing_shards_and_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        LazyCheckpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"names model-00001-of-00002\.safetensors, which is missing"):
        LazyCheckpoint(tmp_path)


def edited(content: str, key: str, value: Any) -> str:
    return json.dumps({**json.loads(content), key: value})


BROKEN = [  # file, what becomes of its text, what merging and loading say of it
    ("config.json", lambda text: text[:-5], r"config\.json is not JSON \(.*\); copy or download it again$"),
    ("config.json", lambda text: "[]", r"config\.json holds no JSON object \(\[\]\); copy or download it again$"),
    ("generation_config.json", lambda text: "{", r"generation_config\.json is not JSON"),
    ("tokenizer_config.json", lambda text: "[]", r"tokenizer_config\.json holds no JSON object"),
    ("model.safetensors.index.json", lambda text: "{", r"index\.json is not JSON"),
    ("model.safetensors.index.json", lambda text: "{}", r"index\.json has no weight_map \(tensor: file\); copy or"),
    ("model.safetensors.index.json", lambda text: '{"weight_map": []}', r"index\.json has no weight_map"),
    (
        "model.safetensors.index.json",
        lambda text: text.replace("00002-of", "00009-of"),
        r"index\.json names model-00009-of-00002\.safetensors, which is missing; copy the model again$",
    ),
]
UNLOADABLE = [
    (lambda text: edited(text, "rope_parameters", 7), r"cannot be loaded: \w+: "),
    (lambda text: edited(text, "num_attention_heads", 0), r"cannot be loaded: ZeroDivisionError: "),
    (lambda text: edited(text, "hidden_size", "16"), r"'hidden_size'.* expected int, got str \(value: '16'\)$"),
]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in two shards."""
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **shape))
    model.save_pretrained(tmp_path / "m", max_shard_size="7KB")
    (tmp_path / "m/tokenizer_config.json").write_text("{}")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2, sorted((tmp_path / "m").iterdir())
    return tmp_path / "m"


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_broken_json_of_a_model_is_named(name: str, change: Any, message: str, sharded: Path) -> None:
    (sharded / name).write_text(change((sharded / name).read_text()))
    for opened in (LazyCheckpoint, load_model):
        with pytest.raises(UserError, match=message):
            opened(str(sharded))


@pytest.mark.parametrize(("change", "message"), UNLOADABLE)
def test_configs_that_transformers_trips_over(change: Any, message: str, sharded: Path) -> None:
    (sharded / "config.json").write_text(change((sharded / "config.json").read_text()))
    with pytest.raises(UserError, match=message) as told:
        load_model(str(sharded))
    assert "\n" not in str(told.value)


def test_a_tensor_in_two_shards_and_shards_beside_a_whole_file(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    held, other = load_file(first), load_file(second)
    name = next(iter(held))
    save_file({**other, name: held[name] + 1}, second, metadata={"format": "pt"})
    for opened in (LazyCheckpoint, load_model):
        with pytest.raises(UserError, match=rf"{name} is in \S+{first.name} and in \S+{second.name}; copy or download"):
            opened(str(sharded))
    save_file({**other, **held, name: held[name] + 2}, sharded / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(LazyCheckpoint(sharded).tensor(name), held[name] + 2), "as transformers has it:"
    assert torch.equal(load_model(str(sharded)).state_dict()[name], held[name] + 2)


@pytest.mark.parametrize("opened", [LazyCheckpoint, load_model])
def test_a_tensor_in_two_bin_shards(opened: Any, sharded: Path) -> None:
    held = {file: load_file(file) for file in sorted(sharded.glob("*.safetensors"))}
    names = {file: f"pytorch_{file.stem}.bin" for file in held}
    places = {name: names[file] for file, tensors in held.items() for name in tensors}
    name, *_ = sorted(held[min(held)])
    for file, tensors in held.items():
        torch.save({**tensors, name: torch.ones(2)}, sharded / names[file])
        file.unlink()
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=rf"{name} is in \S+00001-of-00002\.bin and in \S+00002-of-00002\.bin; copy"):
        opened(str(sharded))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_cannot_be_merged_are_named(kind: torch.dtype, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2).to(kind)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: w is (F8_E4M3|C64), no F64, .*; give the model as"):
        LazyCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("held", "cut", "message"),
    [
        ({"w": torch.ones(999)}, 3000, r"pytorch_model\.bin cannot be read as tensors \(.*\); copy it again, or save"),
        (
            {"state_dict": {"w": torch.ones(2)}},
            0,
            r"pytorch_model\.bin holds more than tensors by name; save the model",
        ),
        ([torch.ones(2)], 0, r"pytorch_model\.bin holds more than tensors by name"),
    ],
)
def test_bin_files_that_hold_something_else(held: Any, cut: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(held, file)
    file.write_bytes(file.read_bytes()[: -cut or None])
    with pytest.raises(UserError, match=message):
        LazyCheckpoint(tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), whole_directory(target) as directory:
        save_file(tensors(), directory / "model.safetensors")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with whole_directory(target) as directory:
        (directory / "x").write_text("1")
    with pytest.raises(UserError, match="exists already; add overwrite=true"), whole_directory(target):
        pass
    assert (target / "x").read_text() == "1"


def test_sizes() -> None:
    assert (bytes_of("5GB"), bytes_of("200MB"), bytes_of(12)) == (5 * 10**9, 2 * 10**8, 12)
    with pytest.raises(UserError, match="max_shard_size='big' is not a size"):
        bytes_of("big")


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_strangers_code_is_named_with_the_key_that_runs_it(what: str, tmp_path: Path) -> None:
    from fusechat.models.load import load_model, load_tokenizer

    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.Tokenizer", null]}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('must not run')")
    with pytest.raises(UserError, match=r"Add source\.trust_remote_code=true .* only if you trust its authors$"):
        load_model(str(tmp_path)) if what == "model" else load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("gigabytes", "vocabulary", "rows"),
    [(80, 152_064, 1024), (80, 32_000, 4864), (24, 152_064, 256), (4, 152_064, 128)],
)
def test_logits_are_computed_in_rows_that_the_device_holds(
    gigabytes: int, vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert chunk_rows.__wrapped__(torch.device("cuda"), vocabulary, 1) == rows
    assert chunk_rows(torch.device("cpu"), vocabulary, 1 << 21) == (1 << 21) // vocabulary
    assert chunk_rows(torch.device("cpu"), vocabulary, 1) == 1


def test_weights_that_a_config_ties_and_that_differ_are_two(tmp_path: Path, recwarn: Any) -> None:
    """As transformers loads them, merging reads them: nobody takes one of the two for both."""
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=False, **shape)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    loaded, read = load_model(str(tmp_path)).state_dict(), LazyCheckpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor) and torch.equal(read.tensor(name), tensor)
    loaded_again = tmp_path / "again"
    load_model(str(tmp_path)).save_pretrained(loaded_again)
    assert sorted(LazyCheckpoint(loaded_again)) == sorted(read)
