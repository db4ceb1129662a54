"""Models of a local server that plays the Hub: downloaded once, pinned, the files needed alone; and clear refusals."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fusechat.app.errors import UserError
from fusechat.models.hub import called, hub_id, local_model
from tests.conftest import ROOT
from tests.merging.golden import make
from tests.serving import serve, url

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as folders; knows the revisions main, v1 and its commit's."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.asked = folders, list[str]()
        self.server = serve(lambda path, headers, body: self.take(path.partition("?")[0]))

    def take(self, path: str) -> tuple[Any, ...]:
        self.asked.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        folder = self.folders.get("/".join(parts[:2]))
        if folder is None:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        verb, revision = (*parts[2:4], "main")[:2] if len(parts) > 3 else ("revision", "main")
        if revision not in ("main", "v1", SHA):
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if "/resolve/" in path:
            file = folder / "/".join(parts[4:])
            if not file.exists():
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            data = file.read_bytes()
            return 200, data, {"ETag": f'"{parts[-1]}"', "X-Repo-Commit": SHA}
        files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        if verb == "tree":
            sizes = [
                {"type": "file", "path": str(f), "size": (folder / f).stat().st_size, "oid": str(f)} for f in files
            ]
            return 200, sizes
        return 200, {"id": "/".join(parts[:2]), "sha": SHA, "siblings": [{"rfilename": str(f)} for f in files]}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    models = make(tmp_path / "served", "fp32")
    (models["t1"] / "original").mkdir()
    for unwanted in ("original/model.safetensors", "training.log", "pytorch_model.bin"):
        (models["t1"] / unwanted).write_bytes(b"none of these is needed")
    made = Hub({"owner/base": models["pivot"], "owner/one": models["t1"], "owner/two": models["t2"]})
    yield made
    made.server.shutdown()


def command(hub: Hub, place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the Hub's address and a cache of its own."""
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url(hub.server), "HF_HOME": str(place / "home"), **environment}
    variables |= {"HF_HUB_DISABLE_XET": "1"}
    words = (sys.executable, *words)
    return subprocess.run(words, cwd=ROOT, text=True, capture_output=True, env=os.environ | variables, timeout=240)


def test_inputs_of_a_merge_come_from_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    given = ["merge.py", "logger=none", f"paths.root={tmp_path}", f"output_dir={tmp_path}/out", "pivot.path=owner/base"]
    given += [f"targets=[owner/one@v1,{hub.folders['owner/two']}]"]
    done = command(hub, tmp_path, *given, "merge=linear")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(hub.folders[f"owner/{name}"] / "model.safetensors") for name in ("one", "two"))
    merged = load_file(tmp_path / "out/model.safetensors")
    assert all(((one[name] + two[name]) / 2 - tensor).abs().max() < 1e-6 for name, tensor in merged.items())
    fetched = [path.rpartition("/")[2] for path in hub.asked if "/owner/one/resolve/" in path]
    assert set(fetched) == {"config.json", "model.safetensors"}
    assert "base_model_relation: merge" not in (tmp_path / "out/README.md").read_text()
    assert "- owner/one" in (tmp_path / "out/README.md").read_text()
    before = len(hub.asked)
    again = command(hub, tmp_path, *given, "merge=slerp", "overwrite=true", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(hub.asked) == before


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    code = """
import sys
from fusechat.app.errors import UserError
from fusechat.models.hub import local_model
for name in sys.argv[1:]:
    try:
        local_model(name)
    except UserError as error:
        print(error)
"""
    done = command(hub, tmp_path, "-c", code, "owner/none", "owner/base@v9")
    unknown, revision = done.stdout.splitlines()
    assert unknown.startswith(
        "owner/none is no folder here, and the Hub knows no such model or does not show it to you"
    )
    assert revision.startswith("the Hub's owner/base has no revision 'v9'; see its branches")


def test_offline_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^owner/name@v1 is no folder here, not whole .* hf download owner/name --rev"):
        local_model("owner/name@v1")
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "./owner/name", "/owner/name", "owner", "a/b/c"):  # paths, there or not
        assert local_model(path) == path


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cached = f"/home/hub/models--owner--some--name/snapshots/{SHA}"
    assert (hub_id(cached), called(cached)) == ("owner/some--name", "some--name")
    assert (hub_id("owner/name@v1"), called("owner/name@v1")) == ("owner/name", "name")
    assert (hub_id("/runs/targets/a"), called("/runs/targets/a")) == (None, "a")
