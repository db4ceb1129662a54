"""Model cards: what the Hub reads of them, whose licence holds, and scores once there are some."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusechat.models.cards import CARD, Made, measured_card, write_card
from fusechat.models.licences import most_restrictive
from tests.conftest import ROOT, Mini
from tests.merging.golden import make


def head(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---")[1]))


def folder(place: Path, **card: Any) -> str:
    place.mkdir(parents=True)
    (place / CARD).write_text(f"---\n{yaml.safe_dump(card)}---\n\n# A model\n")
    return str(place)


@pytest.mark.parametrize(
    ("licences", "found", "said"),
    [
        (["mit", "apache-2.0"], {"license": "apache-2.0"}, "Licence: apache-2.0, the most restrictive of the parents'"),
        (["apache-2.0", "cc-by-nc-4.0"], {"license": "cc-by-nc-4.0"}, "Licence: cc-by-nc-4.0, the most"),
        (["llama3", "llama3"], {"license": "llama3"}, "Licence: llama3"),
        (["mit", "other (acme)"], {"license": "other", "license_name": "acme"}, "Licence: other (acme), the most"),
        (["gpl-3.0", "llama3"], {"license": "other", "license_name": "several"}, "Licence: that of every parent holds"),
        (["mit", None], {}, "Licence: not stated, since that of `m1` is not known here"),
        ([], {}, "Licence: not stated, since that of its parents"),
    ],
)
def test_the_most_restrictive_licence_or_none(licences: list[str | None], found: dict[str, str], said: str) -> None:
    licence, why = most_restrictive({f"m{i}": licence for i, licence in enumerate(licences)})
    assert licence == found
    assert why.startswith(said)


def test_a_merge_of_fine_tuned_folders_names_what_these_come_from(tmp_path: Path) -> None:
    pivot = f"{tmp_path}/hub/models--owner--base/snapshots/0123abcd"
    folder(Path(pivot), license="mit")
    first = folder(tmp_path / "a", license="mit", base_model=["owner/base"], datasets=["owner/chats"])
    second = folder(tmp_path / "b", license="apache-2.0", base_model="owner/other")
    made = Made(
        "Merged by ties.", {"pivot": pivot, "target 1": first, "target 2": second}, [first, second], tags=["merge"]
    )
    write_card(tmp_path, "both", made)
    text = (tmp_path / CARD).read_text()
    found = head(text)
    assert found["base_model"] == ["owner/base", "owner/other"]
    assert found["base_model_relation"] == "merge"
    assert (found["datasets"], found["license"]) == (["owner/chats"], "apache-2.0")
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"fusechat", "model-fusion", "merge"} <= set(found["tags"])
    assert not {"model-index", "model_name"} & set(found)
    assert "| pivot | `owner/base` |" in text
    write_card(
        tmp_path, "one", Made("Supervised fine-tuning alone.", {"pivot": pivot}, [pivot], ["owner/chats", first])
    )
    assert head((tmp_path / CARD).read_text())["base_model_relation"] == "finetune"
    assert head((tmp_path / CARD).read_text())["datasets"] == ["owner/chats"]
    write_card(tmp_path, "none", Made("Of folders without cards.", {"pivot": "/nowhere"}, ["/nowhere"]))
    assert not {"base_model", "base_model_relation", "license", "datasets"} & set(head((tmp_path / CARD).read_text()))


def test_scores_replace_what_stood_there(tmp_path: Path) -> None:
    made = Made("A target.", {"pivot": "/nowhere"}, ["/nowhere"])
    write_card(tmp_path, "a", made, {"validation/bits_per_byte": 0.5})
    entry = {"value": 0.25, "low": 0.2, "high": 0.3, "count": 7}
    result = {"kind": "chats", "tests": "0123", "samples": [], "metrics": {"bits_per_byte": {"all": entry}}}
    for _ in range(2):
        (tmp_path / CARD).write_text(measured_card(tmp_path, [result]))
    text = (tmp_path / CARD).read_text()
    (measured,) = head(text)["model-index"][0]["results"]
    assert measured["metrics"][0]["value"] == 0.25
    assert text.count("## Measured") == text.count("| chats | bits_per_byte | 0.2500 | 0.2000 to 0.3000 | 7 |") == 1
    assert "validation/bits_per_byte" not in text
    assert measured_card(tmp_path, []) == text


def test_a_report_tells_the_merged_models_card(fresh: Mini) -> None:
    for source in ("a", "b"):
        fresh.run("train", f"source={source}", "trainer.max_steps=1")
    targets = ",".join(str(fresh.experiment / "targets" / source) for source in ("a", "b"))
    fresh.run("merge", "merge=linear", f"targets=[{targets}]")
    merged = fresh.experiment / "merged/linear"
    assert "model-index" not in head((merged / CARD).read_text())
    before = json.loads((merged / "fusechat.json").read_text())
    fresh.run("evaluate", f"model={merged}", "evaluation.generate=false")
    assert "model-index" not in head((merged / CARD).read_text()), "evaluate leaves models as they are"
    fresh.run("report")
    text = (merged / CARD).read_text()
    measured = json.loads((fresh.experiment / "evaluation/merged-linear.json").read_text())["metrics"]
    results = head(text)["model-index"][0]["results"]
    assert {entry["type"] for result in results for entry in result["metrics"]} == set(measured)
    assert json.loads((merged / "fusechat.json").read_text()) == before
    assert f"target 1 | `{fresh.experiment / 'targets/a'}`" in text


def test_a_report_takes_what_a_killed_one_left_and_names_a_card_that_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fusechat.report import stage

    place = Path(folder(tmp_path / "a", license="mit"))
    (place / "fusechat.json").write_text("{}")
    left = place / f".{CARD}.123.tmp"
    left.write_text("half")
    stage._tell_on_cards({place: tmp_path / "evaluation"})
    assert not left.exists()
    for broken in (b"---\n\x95\n---\n", b"---\na: [\n---\n"):
        (place / CARD).write_bytes(broken)
        caplog.clear()
        stage._tell_on_cards({place: tmp_path / "evaluation"})
        assert (place / CARD).read_bytes() == broken
        assert f"{place / CARD} cannot be read (" in caplog.text
        assert "it gets no scores; mend its text" in caplog.text


def test_the_command_works_from_the_folder_that_the_card_names(tmp_path: Path) -> None:
    """Also with a config folder of one's own and absolute paths; no path of a person's stands in it."""
    models, home = make(tmp_path, "fp32"), tmp_path / "home"
    targets = f"targets=[{models['t1']},{models['t2']}]"
    (home / "conf/experiment").mkdir(parents=True)
    (home / "conf/experiment/mine.yaml").write_text("# @package _global_\nexperiment_name: mine\n")
    folder = ["--config-dir", str(home / "conf"), "experiment=mine"]
    given = ["merge=linear", f"pivot.path={models['pivot']}", targets, f"output_dir={home}/out", "logger=none"]
    run = {"text": True, "capture_output": True, "timeout": 120, "check": True}
    run["env"] = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "FUSECHAT_ROOT": str(home / "runs")}
    subprocess.run([sys.executable, "-m", "fusechat.merging", *folder, *given], cwd=home, **run)
    os.rename(home / "out", tmp_path / "out")
    text = (tmp_path / "out" / CARD).read_text()
    assert "--config-dir conf" in text and str(tmp_path) not in text
    command = shlex.split(text.split("```sh\n")[1].split("\n```")[0])
    named = Path(text.split("Made in `")[1].split("`")[0].replace("~", str(tmp_path)))
    assert named == home and command[:3] == ["python", "-m", "fusechat.merging"]
    made = (tmp_path / "out/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    subprocess.run([sys.executable, *command[1:]], cwd=named, **run)
    assert (home / "out/model.safetensors").read_bytes() == made
