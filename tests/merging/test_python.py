"""merge() from Python, and a method of the user's own, by command as well."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

import merge as command
from fusechat.app.command import CONF, run_stage
from fusechat.app.errors import UserError
from fusechat.merging import METHODS, merge
from tests.conftest import ROOT
from tests.merging.golden import make
from tests.merging.golden import merge as run_merge

MINE = """
from fusechat.merging import METHODS

@METHODS.register("mine", "the targets' mean, as far as scale says", needs=("weights", "name"))
def mine(slices, weights, name, scale=1.0):
    for pivot, targets in slices:
        mean = sum(w * t for w, t in zip(weights, targets)) / sum(weights)
        yield pivot if name == "lm_head.weight" else pivot + scale * (mean - pivot)
"""
YAML = "# merge=mine: the targets' mean, as far as scale says\ndefaults: [common]\nmethod: mine\nscale: 1.0\n"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return make(tmp_path, "fp32")


def inputs(models: dict[str, Path]) -> tuple[Path, list[Path]]:
    return models["pivot"], [models[name] for name in ("t1", "t2", "t3")]


def test_python_makes_what_the_command_makes(models: dict[str, Path], tmp_path: Path) -> None:
    by_command = run_merge(models, "merge=varm", "merge.granularity=layer")
    settings = {"granularity": "layer"}
    made = merge("varm", *inputs(models), tmp_path / "python", settings=settings, record={"note": "by hand"})
    assert made.made
    assert made.path == tmp_path / "python"
    assert (made.path / "model.safetensors").read_bytes() == (by_command / "model.safetensors").read_bytes()
    records = [json.loads((path / "fusechat.json").read_text()) for path in (by_command, made.path)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[1]["note"] == "by hand"
    assert made.groups == records[0]["weights"]
    again = merge("varm", *inputs(models), tmp_path / "python", settings=settings)
    assert not again.made
    assert again.groups == made.groups
    with pytest.raises(UserError, match=r"holds a merged model made with other settings .*; add overwrite=true"):
        merge("linear", *inputs(models), tmp_path / "python")
    assert merge("linear", *inputs(models), tmp_path / "python", overwrite=True).made


def test_a_dry_run_describes(models: dict[str, Path], tmp_path: Path) -> None:
    seen = merge("widen", *inputs(models), tmp_path / "out", dry_run=True)
    assert "lm_head.weight  (64, 32)  float32  by element" in seen.description
    assert not seen.path.exists()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"weights": [1.0, 2.0]}, r"merge.weights has 2 values for 3 targets; give one for each"),
        ("ties", {"settings": {"density": [0.1, 0.2]}}, r"merge.density has 2 values for 3 targets"),
        ("ties", {"settings": {"gamma": 1}}, r"merge=ties has no setting 'gamma'; it knows: density, scale, normalize"),
        ("linear", {"patterns": [{"match": "mlp", "weights": [1]}]}, r"merge.patterns\[0\].weights has 1 values for 3"),
        (
            "linear",
            {"patterns": [{"match": "mlp"}]},
            r"merge.patterns\[0\]=.* needs match and weights, or match and keep",
        ),
        ("linear", {"dtype": "int8"}, r"merge.dtype='int8' is unknown; use one of: float32, bfloat16, float16"),
        ("linear", {"max_shard_size": "big"}, r"merge.max_shard_size='big': expected a size"),
        ("linear", {"max_shard_size": "bigGB"}, r"merge.max_shard_size='bigGB': expected a size"),
        ("linear", {"max_shard_size": 0}, r"merge.max_shard_size=0: expected a size"),
        ("linear", {"weights": [1, -1, 0]}, r"the weights \[1, -1, 0\] sum to zero; set merge.normalize=false"),
        ("linear", {"weights": [1, float("nan"), 0]}, r"merge.weights\[1\]=nan: expected a number"),
        ("linear", {"weights": [1, "x", 0]}, r"merge.weights\[1\]='x': expected a number"),
        ("sce", {"weights": [1, 1, 1]}, r"merge.weights is given, but merge=sce takes no weights; remove it"),
        ("varm", {"weights": [1, 1, 1]}, r"merge.weights is given, but merge=varm takes no weights"),
        (
            "sce",
            {"patterns": [{"match": "mlp", "weights": [1, 1, 1]}]},
            r"patterns\[0\].weights is given, but merge=sce",
        ),
        (
            "linear",
            {"patterns": [{"match": "(", "keep": "pivot"}]},
            r"patterns\[0\].match='\(': expected a regular expression",
        ),
        (
            "linear",
            {"patterns": [{"match": "mpl", "keep": "pivot"}]},
            r"patterns\[0\].match='mpl' fits no parameter of ",
        ),
        ("ties", {"settings": {"density": 0}}, r"merge.density=0: expected a number above 0, at most 1"),
        (
            "ties",
            {"settings": {"density": [0.5, 2, 0.5]}},
            r"merge.density=\[0.5,2,0.5\]: expected a number above 0, at most 1",
        ),
        ("sce", {"settings": {"density": float("nan")}}, r"merge.density=nan: expected a number above 0, at most 1"),
        (
            "breadcrumbs",
            {"settings": {"density": 0.5, "gamma": 1.0}},
            r"merge.gamma=1.0: expected a number from 0 to below 1",
        ),
        ("varm", {"settings": {"temperature": 0}}, r"merge.temperature=0: expected a number above 0"),
        ("slerp", {"settings": {"t": "half"}}, r"merge.t='half': expected a number from 0 to 1"),
        ("task_arithmetic", {"settings": {"scale": float("inf")}}, r"merge.scale=inf: expected a number"),
        ("linear", {"device": "tpu"}, r"merge.device='tpu': expected auto, cpu, cuda, cuda:1 or mps"),
        ("best", {}, r"merge.method='best' is unknown; use one of: breadcrumbs, compress, dare"),
        ("compress", {}, r"merge=compress needs the target to store: add target=DIR \(3 given\)"),
        ("sce", {"settings": {"select": "all"}}, r"merge.select='all' is unknown; use one of: weights, deltas"),
        ("varm", {"settings": {"granularity": "row"}}, r"merge.granularity='row' is unknown"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    method: str, options: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        merge(method, *inputs(models), tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_method_of_ones_own(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_methods.py").write_text(MINE)
    (tmp_path / "conf/merge").mkdir(parents=True)
    (tmp_path / "conf/merge/mine.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(METHODS, "_members", dict(METHODS._members))  # the method leaves with the test
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)  # another test's module of that name
    pivot, targets = inputs(models)
    overrides = [f"pivot.path={pivot}", f"targets=[{','.join(map(str, targets))}]", "logger=none", "merge=mine"]
    overrides += ["merge.scale=0.5", "imports=[my_methods]", f"output_dir={tmp_path}/mine", f"paths.root={tmp_path}"]
    overrides += [f"hydra.searchpath=[file://{tmp_path}/conf]"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        run_stage(command.run, compose("merge", overrides))
    own, *others = (load_file(path / "model.safetensors") for path in (pivot, *targets))
    for name, tensor in load_file(tmp_path / "mine/model.safetensors").items():
        mean = sum(other[name] for other in others) / 3
        wanted = own[name] if name == "lm_head.weight" else own[name] + 0.5 * (mean - own[name])
        assert torch.allclose(tensor, wanted, atol=1e-7), name
    assert json.loads((tmp_path / "mine/fusechat.json").read_text())["method"] == "mine"
    plain = merge("mine", pivot, targets, tmp_path / "plain", settings={"scale": 0.5})
    marks = [
        json.loads((path / "fusechat.json").read_text())["fingerprint"] for path in (tmp_path / "mine", plain.path)
    ]
    assert marks[0] != marks[1], "the module's source is part of the fingerprint"


def test_importing_the_interface_brings_no_torch() -> None:
    code = "import fusechat.merging, sys; print([m for m in ('torch', 'numpy', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    code = (
        "from fusechat.merging import merge; import sys; print([m for m in ('hydra', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
