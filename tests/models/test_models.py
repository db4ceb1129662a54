"""Checkpoints: streamed writing equals safetensors' own, .bin files without running code, directories whole or not at all."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusechat.app.errors import UserError
from fusechat.app.outputs import whole_directory
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.heads import chunk_rows
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
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        LazyCheckpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_missing_shards_and_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        LazyCheckpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"names model-00001-of-00002\.safetensors, which is missing"):
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
