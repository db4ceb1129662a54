"""A federation over Flower, two SuperNodes on this machine: the same messages and models as the local way.

In an environment with flwr (make federated), of which the rest of the suite knows nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fusechat.mutual import mutual
from fusechat.mutual.__main__ import composed, federation_of
from tests.conftest import ROOT
from tests.mutual.conftest import CANARY, Small

pytestmark = pytest.mark.federated
BIN = Path(sys.executable).parent
LONG = 900  # seconds; a minute where nothing else runs
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


def settings(small: Small, out: Path, method: str, clients: dict[str, str], chats: bool = True) -> list[str]:
    told = {name: f", chats: {small.root}/private_{name}.jsonl" if chats else "" for name in clients}
    named = ", ".join(f"{name}: {{path: {small.root}/{model}{told[name]}}}" for name, model in clients.items())
    own = [f"pivot.path={small.root}/server", f"chat.path={small.root}/public.jsonl", f"output_dir={out}"]
    own += [f"mutual.clients={{{named}}}", f"paths.root={out.parent}/runs", f"mutual={method}", "mutual.rounds=1"]
    own += ["chat.template=native", "fusion=dual_min_ce", "extract.top_k=4", "lora.r=2", "trainer.max_epochs=1"]
    own += ["chat.max_length=128", "data.validation_fraction=0.0", "logger=none", "merge=linear"]
    return [*own, "callbacks.progress_bar=false", "optimizer.lr=0.01"]


class Flower:
    """A SuperLink and SuperNodes in a folder, ended with the test. secure: with TLS and keys of the SuperNodes."""

    def __init__(self, folder: Path, secure: bool) -> None:
        self.folder, self.secure, self.running = folder, secure, list[subprocess.Popen[bytes]]()
        self.environment = os.environ | QUIET | {"FLWR_HOME": str(folder), "PYTHONPATH": str(ROOT)}
        self.environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
        self.address = f"127.0.0.1:{port()}"
        folder.mkdir()
        files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
        keys = [part for kind, file in files.items() for part in (f"--ssl-{kind}", str(folder / file))]
        shown = f'root-certificates = "{folder}/ca.pem"' if secure else "insecure = true"
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n{shown}\n'
        )
        if secure:
            certificates(folder)
        self.how = [*keys, "--enable-supernode-auth"] if secure else ["--insecure"]
        self.link()

    def link(self) -> None:
        """Starts a SuperLink and waits until it answers."""
        own = ["--port", self.address.split(":")[1], "--disable-runtime-dependency-installation"]
        self.start("superlink", "flower-superlink", *self.how, *own)
        self._wait()

    def start(self, name: str, command: str, *given: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            told = {"env": self.environment, "stdout": log, "stderr": log}
            self.running.append(subprocess.Popen([str(BIN / command), *given], **told))  # type: ignore[call-overload]

    def join(self, name: str, given: list[str]) -> None:
        """A client's SuperNode; its key is made and made known first, where keys are asked for."""
        how = ["--insecure"]
        if self.secure:
            key = self.folder / f"{name}.key"
            subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
            self.flwr("supernode", "register", f"{key}.pub")
            how = ["--root-certificates", str(self.folder / "ca.pem"), "--auth-supernode-private-key", str(key)]
        told = f'settings="{shlex.join([*given, f"mutual.side={name}"])}"'
        places = ["--superlink", self.address, "--port", str(port())]
        self.start(name, "flower-supernode", *how, *places, "--node-config", told)

    def flwr(self, *given: str) -> str:
        done = subprocess.run([str(BIN / "flwr"), *given], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in sorted(self.folder.glob("*.log")))

    def _wait(self) -> None:
        scheme, end = "https" if self.secure else "http", time.monotonic() + LONG
        while time.monotonic() < end:
            try:
                httpx.get(f"{scheme}://{self.address}/health", verify=False)
                return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise AssertionError(self.logs())


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def certificates(folder: Path) -> None:
    """As docs/mutual.md makes them."""
    ours = (ROOT / "docs/mutual.md").read_text()
    block = next(part for part in ours.split("```console\n")[1:] if part.startswith("openssl")).split("```")[0]
    done = subprocess.run(block.replace("HOST", "127.0.0.1"), shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def flower(tmp_path: Path, secure: bool) -> Iterator[Flower]:
    made = Flower(tmp_path / "flower", secure)
    yield made
    for process in reversed(made.running):
        process.terminate()
    for process in reversed(made.running):
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.parametrize(
    ("method", "models", "secure"),
    [("fedmkt", {"a": "a", "b": "b"}, False), ("fedavg", {"a": "a", "b": "a"}, True)],
)
def test_a_federation_gives_the_numbers_of_the_local_way(
    method: str, models: dict[str, str], small: Small, flower: Flower, tmp_path: Path
) -> None:
    ours, far = tmp_path / "ours", tmp_path / "far"
    for name, model in models.items():
        flower.join(name, settings(small, tmp_path / name, method, {name: model}))
    told = f'settings="{shlex.join(settings(small, far, method, models, chats=False))}"'
    app = str(ROOT / "examples/federation")
    assert json.loads(flower.flwr("run", app, "--run-config", told, "--format", "json"))["success"]
    mutual(federation_of(composed(settings(small, ours, method, models))))
    until(far / "fusechat.json", flower)
    assert sent(ours) == sent(far)
    assert len(sent(ours)) == (6 if method == "fedmkt" else 8)
    for name, folder in {"server": far, **{name: tmp_path / name for name in models}}.items():
        made = [place / name / "model.safetensors" for place in (ours, folder)]
        assert made[0].exists() == made[1].exists() == (name != "server" or method == "fedmkt")
        assert not made[0].exists() or made[0].read_bytes() == made[1].read_bytes()
    for name in models:
        assert not (far / name).exists(), "a client's model stays with it"
        assert CANARY.format(name)[4:] not in flower.logs()
    lines = [(place / "rounds.csv").read_text().splitlines() for place in (ours, far)]
    assert lines[1] == [line for line in lines[0] if line.split(",")[1] in ("side", "server")] or method == "fedavg"


def until(file: Path, flower: Flower) -> None:
    """Waits for a file that a run makes."""
    end = time.monotonic() + LONG
    while not file.exists() and time.monotonic() < end:
        assert "finished:failed" not in flower.flwr("list", "--format", "json"), flower.logs()
        time.sleep(2)
    assert file.exists(), flower.logs()


def sent(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in (folder / "exchange").rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose task this process is, as Flower's own processes are told."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Nodes 1 to 5: a; b, whose part fails; c, who never answers; d, who sends a file too many; another a."""

    names = {1: "a", 2: "b", 3: "c", 4: "d", 5: "a"}

    def get_node_ids(self) -> list[int]:
        return [*self.names]

    def send_and_receive(self, messages: list[Any], timeout: float | None = None) -> Iterator[Any]:
        from flwr.app import ConfigRecord, RecordDict

        for message in messages:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "query":
                content = RecordDict({"side": ConfigRecord({"name": self.names[node]})})
            elif node == 3:
                continue
            else:
                files = {"envelope.json": b"{}"} | ({"chats.jsonl": b"x"} if node == 4 else {})
                content = RecordDict({"message": ConfigRecord(files)})
            reply = SimpleNamespace(metadata=SimpleNamespace(src_node_id=node), content=content)
            reply.has_content = lambda node=node, kind=message.metadata.message_type: node != 2 or kind == "query"
            yield reply


def test_a_round_goes_on_without_those_who_cannot(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture, known: None
) -> None:
    from fusechat.mutual.flower import Clients

    made = small.federation(tmp_path / "out")
    ask = Clients(Grid(), replace(made, clients=dict.fromkeys("abcde", made.clients["a"])), 2.0)  # type: ignore[arg-type]
    assert ask([*"abcde"], 1) == {
        "b": "its ClientApp failed",
        "c": "it was late",
        "d": "a message holds 'chats.jsonl'; it is not read",
        "e": "no SuperNode is there with mutual.side=e",
    }
    assert (made.exchange.place(1, "a") / "envelope.json").exists() and not made.exchange.place(1, "d").exists()
    assert [made.done(name, 1).exists() for name in "ab"] == [True, False]
    assert "SuperNodes 1 and 5 both say they are a; the first is" in caplog.text


def test_a_client_with_other_settings_says_which(small: Small, tmp_path: Path, known: None) -> None:
    from flwr.app import Message

    from fusechat.mutual.flower import _part, take_part

    clients = {"a": "a", "b": "b"}
    server = federation_of(composed(settings(small, tmp_path / "far", "fedmkt", clients, chats=False)))
    own = [*settings(small, tmp_path / "a", "fedmkt", {"a": "a"}), "mutual.side=a", "loss.lm_weight=0.5"]
    for given, reason in (
        (own, "its settings are others than the server's (terms.loss.lm_weight: 0.9 at the server, 0.5 now)"),
        (["nonsense=1"], "its part could not begin; its SuperNode's log says why"),
    ):
        context = SimpleNamespace(node_config={"settings": shlex.join(given)})
        message = Message(_part(server, 1), dst_node_id=1, message_type="train")
        message.metadata.__dict__["_message_id"] = "1"
        reply = take_part(message, context)
        assert reply.content.config_records["failed"]["reason"] == reason
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("secure", [True])
def test_who_has_no_registered_key_is_not_let_in(flower: Flower, small: Small, tmp_path: Path) -> None:
    key = flower.folder / "stranger.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    how = ["--root-certificates", str(flower.folder / "ca.pem"), "--auth-supernode-private-key", str(key)]
    how += ["--superlink", flower.address, "--port", str(port()), "--max-retries", "1"]
    flower.start("stranger", "flower-supernode", *how)
    assert flower.running[-1].wait(LONG) != 0
    assert "Activated node_id" not in flower.logs()


@pytest.mark.parametrize("secure", [False])
def test_a_killed_superlink_goes_on_with_the_round(small: Small, flower: Flower, tmp_path: Path) -> None:
    """Killed where a client's part of a round has begun: the same `flwr run` ends with what an unkilled one makes."""
    ours, far, models = tmp_path / "ours", tmp_path / "far", {"a": "a"}
    flower.join("a", settings(small, tmp_path / "a", "fedmkt", models))
    told = f'settings="{shlex.join(settings(small, far, "fedmkt", models, chats=False))}"'
    run = ["run", str(ROOT / "examples/federation"), "--run-config", told, "--format", "json"]
    flower.flwr(*run)
    until(tmp_path / "a/sides/a/round-01", flower)
    flower.running[0].kill()
    flower.running[0].wait()
    assert not (far / "rounds").exists(), "killed before its end"
    flower.link()
    flower.join("a", settings(small, tmp_path / "a", "fedmkt", models))
    flower.flwr(*run)
    until(far / "fusechat.json", flower)
    mutual(federation_of(composed(settings(small, ours, "fedmkt", models))))
    assert sent(ours) == sent(far)
