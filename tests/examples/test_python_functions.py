"""examples/python_functions: its chats from a made-up library, its models from made-up wheels, its experiments."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from fusechat.app.door import check_config
from fusechat.chats.formats import load_chats
from fusechat.pipeline.steps import expand
from tests.conftest import ROOT, composed
from tests.examples.conftest import HERE

FUNCTION = '''
def {name}(values, other):
    """Say what {name} makes of some values and of the other."""
    of_{name} = {{}}
    for {name}_value in values:
        of_{name}[{name}_value] = other({name!r}, {name}_value, {number})
    return sorted(of_{name}.items(), key=lambda {name}_pair: {name}_pair[0])
'''


def install(folder: Path, name: str, files: dict[str, str], *about: str) -> metadata.Distribution:
    """A package as pip would have left it."""
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *about, "", ""])
    )
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return metadata.Distribution.at(info)


@pytest.mark.parametrize(
    ("about", "licence"),
    [
        (["License-Expression: MIT"], "MIT"),
        (["License: BSD 3-Clause License", " and its text"], "BSD 3-Clause License"),
        (["License: UNKNOWN", "Classifier: License :: OSI Approved :: MIT License"], "MIT License"),
        (["License-Expression: MPL-2.0 AND MIT"], ""),
        (["License: MIT", "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], ""),
        (["License: Copyright, all rights reserved"], ""),
        ([], ""),
    ],
)
def test_only_what_is_clearly_permissive_counts(
    prepare: ModuleType, tmp_path: Path, about: list[str], licence: str
) -> None:
    assert prepare.licence_of(install(tmp_path, "some", {}, *about)) == licence


def test_a_docstring_asks_and_the_function_answers(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(FUNCTION.format(name="first", number=1) + "\ndef bare(a):\n    return [a]\n")
    (row,) = prepare.functions("some 1.0", "MIT", [tmp_path / "a.py"])
    question, answer = (message["content"] for message in row["messages"])
    assert question == "Write a Python function `first`.\n\nSay what first makes of some values and of the other."
    assert answer.startswith("def first(values, other):\n    of_first = {}\n") and '"""' not in answer
    ast.parse(answer)
    assert (row["tag"], row["licence"]) == ("some", "MIT")
    assert row["origin"] == f"some 1.0: {tmp_path.name}/a.py, first"


def test_what_is_no_question_with_an_answer_is_left_out(prepare: ModuleType, tmp_path: Path) -> None:
    whole = FUNCTION.format(name="f", number=1)
    broken = {
        "decorated": "@cache" + whole,
        "in a class": "class A:\n" + whole.replace("\n", "\n    "),
        "a word for a docstring": whole.replace("Say what f makes of some values and of the other.", "Say."),
        "too long": whole.replace("    return", "    of_f[0] = 0\n" * 50 + "    return"),
        "not ASCII": whole.replace("Say", "Säg"),
        "no Python": whole.replace("def", "fed"),
        "a stub": 'def f(a):\n    """A docstring that is as long as it has to be."""\n    raise NotImplementedError\n',
    }
    for name, text in broken.items():
        (tmp_path / "a.py").write_text(text, encoding="utf-8")
        assert not list(prepare.functions("some 1.0", "MIT", [tmp_path / "a.py"])), name


def test_others_code_inside_a_package_is_left_out(prepare: ModuleType, tmp_path: Path) -> None:
    own = [tmp_path / name for name in ("own.py", "deep/own.py")]
    names = ("_vendor/a.py", "deep/externals/b.py", "third_party/c.py", "tests/d.py", "extern/e.py", "vendored/f.py")
    assert set(prepare.sources(tmp_path, [*own, *(tmp_path / name for name in names)])) == set(own)


def grams(code: str) -> set[tuple[str, ...]]:
    """Runs of 13 words and signs, found another way."""
    words = re.findall(r"'[^']*'|\w+|[^\w\s]", code)
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


@pytest.fixture
def library(tmp_path: Path) -> list[tuple[str, str, list[Path]]]:
    """Forty packages of three functions; in every one a copy of the same function, and one of its own project twice."""
    found = []
    for number in range(40):
        name = f"lib{number}x"
        for at, (function, mark) in enumerate([(f"own{number}", number), ("copied", 0), (f"more{number}", -number)]):
            file = tmp_path / name / f"{at}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(FUNCTION.format(name=function, number=mark))
        found.append((f"{name} 1.0", "MIT", sorted((tmp_path / name).iterdir())))
    return found


def test_no_package_and_no_code_stands_on_two_sides(prepare: ModuleType, library: Any) -> None:
    parts = prepare.split(library, {"test": 10, "choosing": 4, "fusion": 12})
    assert {part: len(rows) for part, rows in parts.items()} == {"test": 10, "choosing": 4, "fusion": 12}
    for part, rows in parts.items():
        others = [row for name in parts if name != part for row in parts[name]]
        assert not {row["tag"] for row in rows} & {row["tag"] for row in others}
        theirs = {gram for row in others for gram in grams(row["messages"][1]["content"])}
        for row in rows:
            assert theirs.isdisjoint(grams(row["messages"][1]["content"]))
    copies = [row for rows in parts.values() for row in rows if row["origin"].endswith("copied")]
    assert len(copies) <= 1, "the same function, in one part, once"
    assert parts == prepare.split(list(reversed(library)), {"test": 10, "choosing": 4, "fusion": 12})


def test_packages_of_a_project_stay_together(prepare: ModuleType) -> None:
    names = ["lightning", "pytorch-lightning", "httpx2", "opentelemetry-sdk", "pydantic_core"]
    assert list(map(prepare.project, names)) == ["lightning", "lightning", "httpx", "opentelemetry", "pydantic"]


def test_too_few_chats_are_told(prepare: ModuleType, library: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    parts = prepare.split(library[:5], {"test": 100, "choosing": 0, "fusion": 0})
    assert f"test: only {len(parts['test'])} chats of 100 are to be had here" in caplog.text


def test_tasks_in_another_style_do_what_their_example_says() -> None:
    rows = [json.loads(line) for line in (HERE / "other_style.jsonl").read_text().splitlines()]
    assert len(rows) >= 60 and len({row["messages"][0]["content"] for row in rows}) == len(rows)
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert set(row) == {"messages", "tag", "licence", "origin"}
        names: dict[str, Any] = {}
        exec(answer, names)
        assert eval(question.partition("\nExample: ")[2], names) is True, question


def test_chats_are_read_as_they_are_written(
    prepare: ModuleType, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "packages", lambda: iter(library))
    prepare.write_chats(tmp_path / "chats")
    for part in ("fusion", "choosing", "test", "other_style"):
        chats, found = load_chats(tmp_path / f"chats/{part}.jsonl")
        assert found == "messages" and all(chats["tag"])
    before = (tmp_path / "chats/fusion.jsonl").read_bytes()
    monkeypatch.setattr(prepare, "packages", lambda: iter(library[:20]))
    prepare.write_chats(tmp_path / "chats")
    assert (tmp_path / "chats/fusion.jsonl").read_bytes() == before, "an experiment keeps its chats"


def test_sides_have_all_fusion_chats_and_no_project_in_common(
    prepare: ModuleType, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = [("python 3.11", "PSF-2.0", library[0][2])]
    monkeypatch.setattr(prepare, "packages", lambda: iter([*python, *library[1:]]))
    prepare.write_chats(tmp_path)
    prepare.write_sides(tmp_path)
    parts = {
        name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("public", "private_a", "private_b")
    }
    whole = (tmp_path / "fusion.jsonl").read_text().splitlines()
    assert sorted(line for part in parts.values() for line in part) == sorted(whole) and all(parts.values())
    tags = {name: {json.loads(line)["tag"] for line in part} for name, part in parts.items()}
    assert tags["private_a"] == {"python"} and not tags["private_b"] & tags["public"]
    assert abs(len(tags["private_b"]) - len(tags["public"])) <= 1


@pytest.mark.parametrize(("group", "key", "name"), [("loss", "kind", "jsd"), ("alignment", "sequence", "dtw")])
def test_the_choice_of_a_member_is_left_to_its_group(group: str, key: str, name: str) -> None:
    given = ["experiment=python_functions", f"hydra.searchpath=[{HERE}]"]
    assert composed("train", [*given, f"{group}={name}"])[group][key] == name


def test_every_step_of_the_federation_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FUSECHAT_PIVOT", "FUSECHAT_SERVER"):
        monkeypatch.delenv(variable, raising=False)
    given = [f"hydra.searchpath=[file://{HERE}]", "experiment=python_functions_fedmkt", "paths.root=runs"]
    made, read = {"runs/python_functions_fedmkt/fedmkt/server"}, list[str]()
    lines: Any = OmegaConf.to_container(composed("pipeline", given).pipeline.steps, resolve=False)
    for verb, overrides in [job for line in lines for job in expand(str(line))]:
        cfg = composed(verb, [*given, *overrides])
        check_config(cfg, [HERE])
        made |= {f"{cfg.output_dir}/{name}" for name in cfg.mutual.clients} if verb == "mutual" else set()
        read += [str(cfg.model)] if verb == "evaluate" else []
    bases = {"HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"}
    assert {*read} == made | bases and all(read.count(model) == 2 for model in read), "each on both test sets"
    assert [part.rows for part in cfg.chat.path] == [32] and "centralised" in str(made)


@pytest.mark.parametrize("experiment", ["python_functions", "python_functions_gemma"])
def test_every_step_composes(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FUSECHAT_PIVOT", "FUSECHAT_QWEN", "FUSECHAT_GEMMA"):
        monkeypatch.delenv(variable, raising=False)
    given = [f"hydra.searchpath=[file://{HERE}]", f"experiment={experiment}"]
    made, read = set(), set()
    for line in OmegaConf.to_container(composed("pipeline", given).pipeline.steps, resolve=False):  # type: ignore[union-attr]
        jobs = expand(str(line))
        cfg = composed(jobs[0][0], [*given, *jobs[0][1]])
        check_config(cfg, [HERE])
        for verb, overrides in jobs:
            cfg = composed(verb, [*given, *overrides])
            made |= {str(cfg.output_dir)} if verb in ("train", "merge") else set()
            read |= {str(cfg.model)} if verb == "evaluate" else set()
    assert made <= read | {str(cfg.targets[0])}, "what is made is evaluated"
    models = {"HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "google/gemma-3-270m"}
    assert read - made <= models
    monkeypatch.setenv("FUSECHAT_QWEN", "some/qwen.gguf")
    assert composed("extract", given).source.path == ("some/qwen.gguf")


def test_it_is_used_by_config_dir(tmp_path: Path) -> None:
    """From any folder, with the package alone."""
    shutil.copytree(HERE, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "fusechat.extract", "--config-dir", "mine", "experiment=python_functions"]
    more = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0 and "name: qwen" in done.stdout, done.stderr
