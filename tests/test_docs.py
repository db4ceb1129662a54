"""What the documentation says is so: every command composes, every link leads somewhere, every block of code runs."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusechat.app import help, registry
from fusechat.app.session import plain
from fusechat.app.verbs import VERBS, WITHOUT_CONFIG
from fusechat.fusion.losses import LOSSES
from fusechat.merging.methods import METHODS
from fusechat.pipeline.steps import expand
from tests.conftest import ROOT, Mini, run_entry
from tests.merging.golden import make

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
FAMILIES = {  # config key -> where its family is
    "loss.kind": "fusechat.fusion.losses:LOSSES",
    "fusion.rule": "fusechat.fusion.rules:RULES",
    "token_map.name": "fusechat.align.maps:TOKEN_MAPS",
    "alignment.sequence": "fusechat.align.sequence:SEQUENCES",
    "merge.method": "fusechat.merging.methods:METHODS",
    "extract.kind": "fusechat.extract.kinds:KINDS",
    "chat.format": "fusechat.chats.formats:FORMATS",
    "evaluation.kind": "fusechat.evaluate.stage:EVALUATIONS",
    "mutual.method": "fusechat.mutual.methods:METHODS",
}


def blocks(language: str, *pages: Path) -> list[str]:
    return [m[2] for page in pages or PAGES for m in BLOCK.finditer(page.read_text()) if m[1] == language]


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    lines += [line for verb in VERBS if verb not in WITHOUT_CONFIG for line in help.examples(verb)]
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines))


@pytest.fixture(scope="module")
def my_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that docs/extend.md describes."""
    folder = tmp_path_factory.mktemp("my_conf")
    for block in blocks("yaml", ROOT / "docs/extend.md"):
        group = "experiment" if block.startswith("# @package _global_") else "merge"
        name = re.search(r"^(?:experiment_name|method): (\w+)", block, re.M)
        assert name is not None
        (folder / group).mkdir(exist_ok=True)
        (folder / group / f"{name[1]}.yaml").write_text(block)
    return folder


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str, my_conf: Path) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no such target: {words[1]}"
        return
    assert words[0] == "python", f"a command that nothing checks: {command}"
    if words[1].startswith("examples/"):
        assert (ROOT / words[1]).exists() and all(w in (ROOT / words[1]).read_text() for w in words[2:])
        return
    verb = words[1].removesuffix(".py") if words[1] != "-m" else words[2].removeprefix("fusechat.")
    assert (ROOT / f"{verb}.py").exists() or importlib.util.find_spec(f"fusechat.{verb}"), f"no such verb: {verb}"
    rest = words[2:] if words[1] != "-m" else words[3:]
    if verb in WITHOUT_CONFIG:
        return
    folder = rest[rest.index("--config-dir") + 1] if "--config-dir" in rest else None
    place = my_conf if folder == "my_conf" else ROOT / str(folder)
    search = [f"hydra.searchpath=[file://{place}]"] if folder else []
    overrides = [w for i, w in enumerate(rest) if not w.startswith("-") and rest[i - 1] != "--config-dir"]
    for number, job in enumerate(jobs(verb, overrides) if "-m" in rest else [overrides]):
        if verb == "pipeline":
            given = composed(verb, [*search, *job], resolved=False)["pipeline"]["steps"]
            assert given
            job = [override for override in job if not override.startswith("pipeline.")]
            if given == "auto" or number:  # test_plan.py composes those; all jobs have the first one's steps
                continue
            for line in given:
                for name, own in expand(line):
                    composed(name, [*search, *job, *own])
        else:  # a sweeper's run_name asks Hydra for the job's number
            composed(verb, [*search, *job], resolved=not any(o.startswith("sweep=") for o in job))


def composed(verb: str, overrides: list[str], resolved: bool = True) -> Any:
    """The config that a command would get."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(registry.CONF.resolve()), version_base="1.3"):
        cfg = compose(verb, overrides)
        return plain(cfg) if resolved else OmegaConf.to_container(cfg)


def jobs(verb: str, overrides: list[str]) -> list[list[str]]:
    """The jobs of a grid sweep."""
    line = shlex.join(["train" if verb == "pipeline" else verb, *overrides])
    return [job for _, job in expand(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def listed() -> str:
    """The table of all families' members, as docs/extend.md shows it."""
    rows = ["| key | name | what it does |", "|---|---|---|"]
    for key, place in FAMILIES.items():
        module, name = place.split(":")
        family = getattr(importlib.import_module(module), name)
        assert family.key == key
        rows += [f"| `{key}` | `{member.name}` | {member.help} |" for member in family.values()]
    return "\n".join(rows)


def test_the_list_of_members_is_the_registry() -> None:
    assert listed() in (ROOT / "docs/extend.md").read_text(), listed()


@pytest.mark.parametrize("key", sorted(FAMILIES))
def test_groups_equal_registries(key: str) -> None:
    """What ``--help`` and the check at the door read from files is what the code has."""
    module, name = FAMILIES[key].split(":")
    assert set(registry.choices(key)) == set(getattr(importlib.import_module(module), name))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the modules that docs/extend.md shows; their members leave with the test."""
    for block in blocks("python", ROOT / "docs/extend.md"):
        name = re.match(r"# (\w+)\.py", block)
        assert name is not None
        assert len(block.splitlines()) <= 10
        (tmp_path / f"{name[1]}.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for family in (LOSSES, METHODS):
        monkeypatch.setattr(family, "_members", dict(family._members))
    for name in ("my_methods", "my_losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_merge_method_as_documented(modules: Path, my_conf: Path) -> None:
    models = make(modules, "fp32")
    given = [f"pivot.path={models['pivot']}", f"targets=[{models['t1']},{models['t2']},{models['t3']}]"]
    given += [
        "merge=median",
        "imports=[my_methods]",
        f"hydra.searchpath=[file://{my_conf}]",
        f"output_dir={modules}/out",
    ]
    run_entry("merge", [*given, "logger=none", f"paths.root={modules}"])
    pivot, *targets = (load_file(models[name] / "model.safetensors") for name in ("pivot", "t1", "t2", "t3"))
    moved = False
    for name, merged in load_file(modules / "out/model.safetensors").items():
        wanted = torch.stack([target[name] for target in targets]).median(0).values
        assert torch.allclose(merged, wanted, atol=1e-6), name
        moved |= not torch.equal(merged, pivot[name])
    assert moved


def test_a_loss_as_documented(modules: Path, fresh: Mini) -> None:
    targets = fresh.experiment / "targets"
    fresh.run("train", "source=a", "imports=[my_losses]", "loss.kind=hellinger", "run_name=mine")
    fresh.run("train", "source=a", "run_name=published")
    mine, published = (load_file(targets / name / "model.safetensors") for name in ("mine", "published"))
    assert any(not torch.equal(mine[name], published[name]) for name in mine)
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.4, 0.6]])
    distance = LOSSES["hellinger"].function(p, p.log(), q.log())
    assert torch.allclose(distance, 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1))


def test_python_block_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("python", ROOT / "README.md")
    assert len(block.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/python/merged")
