"""The package as a user has it: built, installed into an empty prefix, run from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import MINI, ROOT
from tests.merging.golden import make

pytestmark = pytest.mark.wheel
STEPS = [
    "tiny",
    "extract source=pivot,a",
    "align source=a",
    "train source=a",
    "train fusion=sft run_name=sft",
    "merge merge=varm",
    "report",
]


class Installed:
    """A wheel in a prefix of its own, beside the environment's packages."""

    def __init__(self, root: Path) -> None:
        source = root / "source"
        shutil.copytree(
            ROOT / "fusechat", source / "fusechat", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copytree(ROOT / "conf", source / "conf")
        for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "merge.py"):
            shutil.copy(ROOT / name, source / name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(source)]
        subprocess.run(build, check=True, capture_output=True, text=True)
        (self.wheel,) = root.glob("fusechat-*.whl")
        self.prefix, self.folder = root / "prefix", root / "empty"
        install = [*pip, "install", "--no-deps", "--target", str(self.prefix), str(self.wheel)]
        subprocess.run(install, check=True, capture_output=True, text=True)
        self.folder.mkdir()

    def run(self, *command: str) -> str:
        """The output of a command in the empty folder; it must succeed."""
        environment = os.environ | {"PYTHONPATH": str(self.prefix)}
        environment.pop("FUSECHAT_ROOT")  # results lie where a user finds them: beside the command
        done = subprocess.run(command, cwd=self.folder, env=environment, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    def fusechat(self, *arguments: str) -> str:
        return self.run(sys.executable, str(self.prefix / "bin/fusechat"), *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_package_and_nothing_beside(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fusechat"}
    held = {name.removeprefix("fusechat/conf/") for name in names if name.startswith("fusechat/conf/")}
    assert held == {str(file.relative_to(ROOT / "conf")) for file in (ROOT / "conf").rglob("*.yaml")}
    found = installed.run(sys.executable, "-c", "import fusechat; print(fusechat.__file__)")
    assert found.startswith(str(installed.prefix))


def test_help(installed: Installed) -> None:
    assert "merge_search" in installed.fusechat("--help")
    assert "merge=" in installed.fusechat("merge", "--help")


def test_a_merge(installed: Installed, tmp_path: Path) -> None:
    models = make(tmp_path, "fp32")
    targets = f"targets=[{models['t1']},{models['t2']}]"
    installed.fusechat(
        "merge", "merge=linear", f"pivot.path={models['pivot']}", targets, "output_dir=merged", "logger=none"
    )
    one, two = (load_file(models[name] / "model.safetensors") for name in ("t1", "t2"))
    merged = load_file(installed.folder / "merged/model.safetensors")
    assert all((merged[name] - (one[name] + two[name]) / 2).abs().max() < 1e-6 for name in merged)


def test_a_pipeline(installed: Installed) -> None:
    steps = ",".join(f'"{step}"' for step in STEPS)
    targets = "targets=[runs/tiny/seed0/targets/a,runs/tiny/seed0/targets/sft]"
    steps = steps.replace('"report"', "'evaluate model=runs/tiny/seed0/merged/varm_matrix',report")
    output = installed.fusechat("pipeline", "experiment=tiny", *MINI, targets, f"pipeline.steps=[{steps}]")
    assert "pipeline finished" in output
    assert (installed.folder / "runs/tiny/seed0/report/index.html").exists()
    assert (installed.folder / "runs/tiny/seed0/merged/varm_matrix/model.safetensors").exists()
