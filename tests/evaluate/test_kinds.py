"""Kinds of evaluation: a user's own, the same work from Python, and files that other models' results are kept in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.app.registry import choices
from fusechat.evaluate import EVALUATIONS, evaluate
from fusechat.evaluate.places import identity, place
from tests.conftest import ROOT, Mini

OWN = """
from fusechat.evaluate.kinds import EVALUATIONS, Work


@EVALUATIONS.register("parameters", "size of each tensor")
def parameters(job):
    def measure(part):
        model = job.load()[0]
        return {"samples": [{"id": name, "tag": "", "size": p.numel()} for name, p in model.named_parameters()]}

    return Work(measure)
"""


def test_the_registry_is_the_config_group() -> None:
    assert set(choices("evaluation.kind")) == set(EVALUATIONS)
    assert all(choices("evaluation.kind").values()), "every file has its line of help"
    with pytest.raises(UserError, match=r"evaluation\.kind='chat' is unknown; use one of: alpaca_eval, chats, lm_eval"):
        EVALUATIONS["chat"]


def test_a_users_own_evaluation(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh.root / "my_evaluation.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(fresh.root))
    monkeypatch.setattr(EVALUATIONS, "_members", dict(EVALUATIONS._members))
    model = fresh.experiment / "world/models/pivot"
    command = [f"model={model}", "evaluation.kind=parameters", "evaluation.file=own/pivot.json"]
    value = fresh.run("evaluate", *command, "imports=[my_evaluation]")
    content = json.loads((fresh.experiment / "evaluation/own/pivot.json").read_text())
    sizes = [sample["size"] for sample in content["samples"]]
    assert value == content["metrics"]["size"]["all"]["value"] == sum(sizes) / len(sizes)
    assert set(content["metrics"]) == {"size"}


def test_from_python_and_by_command_are_one_evaluation(fresh: Mini) -> None:
    model, chats = fresh.experiment / "world/models/a", fresh.experiment / "world/chats/test.jsonl"
    value = fresh.run("evaluate", f"model={model}")
    file = fresh.experiment / "evaluation/models-a.json"
    before = file.stat().st_mtime_ns
    cfg = fresh.cfg("evaluate", f"model={model}")
    options = {"max_new_tokens": 16, "batch_size": 128, "max_length": cfg.chat.max_length}
    result = evaluate(model, chats, file, **options)
    assert file.stat().st_mtime_ns == before, "what the command made is recognised"
    assert result["metrics"]["bits_per_byte"]["all"]["value"] == value
    own = evaluate(model, chats, fresh.root / "own.json", **options, record={"why": "a try"})
    assert (own["metrics"], own["samples"], own["why"]) == (result["metrics"], result["samples"], "a try")
    assert read_json(fresh.root / "own.json") == own


def test_models_of_one_short_name_keep_their_own_files(fresh: Mini) -> None:
    elsewhere = fresh.root / "other/models/pivot"
    shutil.copytree(fresh.experiment / "world/models/a", elsewhere)
    first = fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot")
    assert fresh.run("evaluate", f"model={elsewhere}") != first
    files = sorted((fresh.experiment / "evaluation").glob("*.json"))
    held = {json.loads(file.read_text())["model"]: file for file in files}
    assert held[f"{fresh.experiment}/world/models/pivot"].name == "models-pivot.json"
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    fresh.run("evaluate", f"model={elsewhere}")
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot")
    assert [file.stat().st_mtime_ns for file in files] == before, "each is found again"


def test_a_copied_experiment_goes_on_with_its_own_files(tmp_path: Path) -> None:
    for root in ("one", "two"):
        (tmp_path / root / "targets/a").mkdir(parents=True)
    result = {"model": f"{tmp_path}/one/targets/a", "config": {"paths": {"experiment": f"{tmp_path}/one"}}}
    file = tmp_path / "targets-a.json"
    file.write_text(json.dumps(result))
    assert place(file, f"{tmp_path}/two/targets/a", f"{tmp_path}/two") == file
    shutil.rmtree(tmp_path / "one")
    assert place(file, f"{tmp_path}/two/targets/a", f"{tmp_path}/two") == file
    assert place(file, f"{tmp_path}/two/targets/a", f"{tmp_path}/three") != file
    assert identity("owner/name", f"{tmp_path}/two") == "owner/name"


def test_the_package_brings_nothing_heavy() -> None:
    code = "import fusechat.evaluate, sys; print([m for m in ('torch', 'numpy', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
