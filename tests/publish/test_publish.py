"""Publishing to a local server that plays the Hub's API: one commit with model, record and measured card."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusechat.app.errors import UserError
from fusechat.publish import publish as publish_from_python
from tests.conftest import ROOT, Mini
from tests.serving import serve, url


class Hub:
    """Takes repositories and commits; every file by the plain way."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.status = 200
        self.server = serve(lambda path, headers, body: (self.status, self.take(path, body)))
        self.url = url(self.server)

    def take(self, path: str, body: bytes) -> Any:
        if path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/owner/name"}
        if "/preupload/" in path:
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            }
        if not body:
            return {"name": "owner", "type": "user"}
        if path.endswith("/validate-yaml"):
            return {"errors": [], "warnings": []}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.url}/owner/name/commit/abc", "commitOid": "abc", "success": True}


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.server.shutdown()


def target(world: Mini) -> Path:
    world.run("train", "source=a", "trainer.max_steps=2")
    path = world.experiment / "targets/a"
    world.run("evaluate", f"model={path}")
    (path / ".fusechat-variation.json").write_text("{}")
    return path


def publish(world: Mini, hub: Hub, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
    command = [
        sys.executable,
        "-m",
        "fusechat.publish",
        *world.base,
        "repo=owner/name",
        *overrides,
    ]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment, timeout=120)


def test_model_card_and_record_go_in_one_commit(fresh: Mini, hub: Hub) -> None:
    path = target(fresh)
    done = publish(fresh, hub, f"model={path}", "publish.dry_run=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (hub.created[0]["name"], hub.created[0]["organization"]) == ("name", "owner")
    assert "private" in json.dumps(hub.created[0])
    assert {"model.safetensors", "config.json", "tokenizer.json", "fusechat.json", "README.md"} <= set(hub.files)
    assert not any(name.startswith(".") for name in hub.files)
    assert hub.files["model.safetensors"] == (path / "model.safetensors").read_bytes()
    front = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    measured = {r["type"]: r["value"] for entry in front["model-index"][0]["results"] for r in entry["metrics"]}
    wanted = json.loads((fresh.experiment / "evaluation/targets-a.json").read_text())["metrics"]
    assert measured == {name: pytest.approx(entry["all"]["value"], abs=1e-5) for name, entry in wanted.items()}
    assert not any(b"hf_secret" in data for data in hub.files.values())
    hub.status = 403
    refused = publish(fresh, hub, f"model={path}", "publish.dry_run=false")
    assert refused.returncode == 1
    assert "the Hub refuses owner/name" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_dry_run_shows_and_sends_nothing(fresh: Mini, capsys: pytest.CaptureFixture[str]) -> None:
    path = target(fresh)
    fresh.run("publish", f"model={path}", "repo=owner/name")
    shown = capsys.readouterr().out
    assert "would send to owner/name" in shown
    assert "model.safetensors" in shown
    assert "model-index" in shown
    publication = publish_from_python(path, "owner/name", experiment=fresh.experiment)
    assert publication.address is None
    assert str(publication) in shown
    with pytest.raises(UserError, match=r"repo='name': expected a Hub id, owner/name"):
        fresh.run("publish", f"model={path}", "repo=name")
    (path / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"is no whole target or merged model \(config\.json and fusechat\.json expected\)"
    ):
        fresh.run("publish", f"model={path}", "repo=owner/name")
