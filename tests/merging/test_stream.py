"""Merging checkpoints: parity at every granularity, streaming, companions, rows by token, dtypes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusechat.app.outputs import read_json, write_json
from fusechat.merging.groups import group_of
from fusechat.merging.varm import BESIDE
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.load import model_identity
from tests.conftest import Mini
from tests.merging.golden import MERGE, make, merge


@pytest.mark.parametrize("granularity", ["model", "layer", "module", "matrix", "parameter"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_varm_equals_the_paper(granularity: str, dtype: str, tmp_path: Path) -> None:
    output = merge(make(tmp_path, dtype), "merge=varm", f"merge.granularity={granularity}")
    ours, wanted = (
        load_file(output / "model.safetensors"),
        load_file(MERGE / "out/varm" / dtype / f"{granularity}.safetensors"),
    )
    for name, tensor in wanted.items():
        difference = (ours[name].double() - tensor.double()).abs()
        unit = 1e-6 if dtype == "fp32" else 2**-7  # one unit in the last place of bf16 is at most 2^-7 relative
        assert bool((difference <= unit * tensor.double().abs() + 1e-9).all()), name
    if granularity != "parameter":
        weights = json.loads((MERGE / "out/varm/weights.json").read_text())[f"{dtype}/{granularity}"]
        found = json.loads((output / "fusechat.json").read_text())["weights"]
        for group, values in weights.items():
            assert found[group] is None if values is None else found[group] == pytest.approx(values, rel=1e-5), group


def test_output_is_a_model_directory_with_its_record(models: dict[str, Path]) -> None:
    (models["pivot"] / "tokenizer_config.json").write_text("{}")
    output = merge(models, "merge=varm")
    assert {
        "config.json",
        "model.safetensors",
        "fusechat.json",
        "README.md",
        "merge_weights.png",
        "tokenizer_config.json",
    } <= {f.name for f in output.iterdir()}
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(output)
    record = json.loads((output / "fusechat.json").read_text())
    assert record["method"] == "varm"
    assert len(record["inputs"]) == 4


def test_sharded_in_and_out_equals_single(models: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(merge(models, "merge=ties") / "model.safetensors")
    tensors = load_file(models["t1"] / "model.safetensors")
    names, half = list(tensors), len(tensors) // 2
    for number, part in enumerate((names[:half], names[half:]), 1):
        save_file({n: tensors[n] for n in part}, models["t1"] / f"model-{number:05d}-of-00002.safetensors")
    weight_map = {n: f"model-{1 + (i >= half):05d}-of-00002.safetensors" for i, n in enumerate(names)}
    (models["t1"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (models["t1"] / "model.safetensors").unlink()
    output = merge(models, "merge=ties", "merge.max_shard_size=20KB", "overwrite=true")
    assert len(list(output.glob("model-*.safetensors"))) > 2
    ours = LazyCheckpoint(output)
    assert all(torch.equal(ours.tensor(n), tensor) for n, tensor in whole.items())
    assert json.loads((output / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(
        t.numel() * 4 for t in whole.values()
    )


@pytest.mark.parametrize("beside", [False, True], ids=["", "of earlier versions"])
def test_statistics_of_seen_targets_are_reused(
    beside: bool, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "memory"))
    inputs = {path: path.read_bytes() for name in ("pivot", "t1", "t2") for path in models[name].iterdir()}
    first = merge(models, "merge=varm")
    weights = json.loads((first / "fusechat.json").read_text())["weights"]
    assert inputs == {path: path.read_bytes() for name in ("pivot", "t1", "t2") for path in models[name].iterdir()}
    target, pivot = model_identity(str(models["t1"])), model_identity(str(models["pivot"]))
    cache = tmp_path / f"memory/variation/{pivot}-{target}.json"
    content = read_json(cache)
    ((_, entry),) = content.items()
    entry["lm_head.weight"][0] *= 100
    if beside:
        cache.unlink()
        cache = models["t1"] / BESIDE
    write_json(cache, content)
    again = json.loads((merge(models, "merge=varm", "overwrite=true") / "fusechat.json").read_text())["weights"]
    assert again["lm_head.weight"][0] > weights["lm_head.weight"][0]
    assert again["model.norm.weight"] == weights["model.norm.weight"]


def test_patterns_and_keep(models: dict[str, Path]) -> None:
    patterns = r"merge.patterns=[{match:'^lm_head',keep:pivot},{match:'mlp',weights:[1,0,0]}]"
    merged = load_file(merge(models, "merge=linear", patterns) / "model.safetensors")
    pivot, t1 = load_file(models["pivot"] / "model.safetensors"), load_file(models["t1"] / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], pivot["lm_head.weight"])
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], t1["model.layers.0.mlp.up_proj.weight"])


def test_dtype_override(models: dict[str, Path]) -> None:
    output = merge(models, "merge=linear", "merge.dtype=bfloat16")
    assert load_file(output / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert "bfloat16" in (output / "config.json").read_text()


def test_dry_run_prints_and_writes_nothing(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = merge(models, "merge=varm", "merge.dry_run=true")
    assert "lm_head.weight  (64, 32)  float32  0.2006" in capsys.readouterr().out
    assert not output.exists()


def test_embedding_rows_are_matched_by_token(models: dict[str, Path]) -> None:
    plain = load_file(merge(models, "merge=linear") / "model.safetensors")
    vocab = {f"t{i}": i for i in range(64)}
    moved = {f"t{i}": (i + 1) % 64 for i in range(64)} | {"<new>": 64}
    for name, table in (("pivot", vocab), ("t1", moved), ("t2", vocab), ("t3", vocab)):
        (models[name] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": table}}))
    tensors = load_file(models["t1"] / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key].roll(1, 0), torch.full((1, 32), 9.0)])
    save_file(tensors, models["t1"] / "model.safetensors")
    again = load_file(merge(models, "merge=linear", "overwrite=true") / "model.safetensors")
    assert all(torch.allclose(plain[name], again[name]) for name in plain)


def test_rows_that_are_matched_are_not_rounded_to_the_pivots_dtype(tmp_path: Path) -> None:
    """A bf16 pivot and targets in fp32: changes below bf16's steps count, wherever the rows lie."""
    models = make(tmp_path, "bf16")
    vocab = {f"t{i}": i for i in range(64)}
    for name in models:
        table = {f"t{i}": (i + 1) % 64 for i in range(64)} if name == "t1" else vocab
        (models[name] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": table}}))
    pivot = load_file(models["pivot"] / "model.safetensors")
    finer = {name: tensor.float() * (1 + 1e-4) for name, tensor in pivot.items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        finer[key] = finer[key].roll(1, 0)
    save_file(finer, models["t1"] / "model.safetensors")
    merged = load_file(
        merge(models, "merge=varm", "merge.dtype=float32", targets=("t1", "pivot")) / "model.safetensors"
    )
    assert all(torch.allclose(merged[name], pivot[name].float() * (1 + 1e-4), rtol=1e-6) for name in pivot)


def test_the_merged_model_has_the_pivots_dtype_and_one_rounding(tmp_path: Path) -> None:
    models, fp32 = make(tmp_path, "bf16"), make(tmp_path / "more", "fp32")
    targets = tuple(str(fp32[name]) for name in ("t1", "t2"))
    merged = load_file(merge(models, "merge=linear", targets=targets) / "model.safetensors")
    a, b = (load_file(Path(target) / "model.safetensors") for target in targets)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (a[name] / 2 + b[name] / 2).bfloat16()), name


def test_pages_that_are_done_with_are_let_go(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of every input is given back, in pieces where a parameter is large, and read again as it was."""
    wanted = load_file(merge(models, "merge=ties") / "model.safetensors")
    given: dict[str, list[tuple[int, int | None]]] = {}
    advise = LazyCheckpoint.let_go

    def noted(self: LazyCheckpoint, name: str, start: int = 0, stop: int | None = None) -> None:
        given.setdefault(f"{self.path.name}:{name}", []).append((start, stop))
        advise(self, name, start, stop)

    monkeypatch.setattr(LazyCheckpoint, "let_go", noted)
    monkeypatch.setattr("fusechat.merging.slices.COMPILED", 500)
    monkeypatch.setattr("fusechat.merging.inputs.MAPPED", 1000)
    again = load_file(merge(models, "merge=ties", "overwrite=true") / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    assert given.keys() == {f"{model}:{name}" for model in ("pivot", "t1", "t2", "t3") for name in wanted}
    assert given["t2:lm_head.weight"][:1] == [(0, 1000)]
    assert given["t2:lm_head.weight"][-1] == (0, None)


@pytest.mark.parametrize(
    ("name", "granularity", "group"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "layer", "model.layers.11"),
        ("model.layers.11.self_attn.q_proj.weight", "module", "model.layers.11.self_attn"),
        ("transformer.h.3.attn.c_attn.bias", "module", "transformer.h.3.attn"),
        ("gpt_neox.layers.0.attention.dense.weight", "layer", "gpt_neox.layers.0"),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", "layer", "model.layers.2"),
        ("model.embed_tokens.weight", "layer", "model.embed_tokens.weight"),
        ("lm_head.weight", "model", "model"),
        ("model.norm.weight", "matrix", "model.norm.weight"),
    ],
)
def test_groups_come_from_names(name: str, granularity: str, group: str) -> None:
    assert group_of(name, granularity) == group


def test_all_methods_on_trained_targets(fresh: Mini) -> None:
    for source in ("a", "b"):
        fresh.run("train", f"source={source}")
    targets = f"targets=[{fresh.experiment}/targets/a,{fresh.experiment}/targets/b]"
    for method in (
        "varm",
        "sce",
        "linear",
        "task_arithmetic",
        "ties",
        "dare",
        "dare_ties",
        "della",
        "breadcrumbs",
        "slerp",
        "model_stock",
        "widen",
    ):
        fresh.run("merge", f"merge={method}", targets)
    assert len(list((fresh.experiment / "merged").iterdir())) == 12
