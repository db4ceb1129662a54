"""FedMKT's rounds on miniature models: who learns from whom, who is gone on without, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fusechat.app.errors import UserError
from fusechat.app.marks import fingerprint
from fusechat.app.outputs import read_json, stamp, write_json
from fusechat.mutual import federation, mutual
from fusechat.mutual.federation import Client, Federation
from fusechat.mutual.methods import SERVER
from fusechat.mutual.sides import LEARNED, PRACTISED
from fusechat.stores.common import CommonText
from fusechat.stores.store import DistributionStore
from tests.conftest import ROOT
from tests.fusion.trained import distance
from tests.mutual.conftest import Small

SIDES = ("server", "a", "b")


def models(folder: Path) -> list[dict[str, object]]:
    return [load_file(folder / name / "model.safetensors") for name in SIDES]


def test_every_side_ends_with_a_model_and_every_round_with_its_record(ended: Federation) -> None:
    for name, path in ended.exchange.models.items():
        moved = distance(load_file(ended.folder / name / "model.safetensors"), load_file(f"{path}/model.safetensors"))
        assert moved > 1e-4
    records = json.loads((ended.folder / "fusechat.json").read_text())["rounds"]
    assert [(record["round"], record["clients"], record["missing"]) for record in records] == [
        (number, ["a", "b"], {}) for number in (1, 2, 3)
    ]
    sent = {name: sum(f.stat().st_size for f in ended.exchange.place(2, name).iterdir()) for name in SIDES}
    assert records[1]["bytes"] == sent
    lines = (ended.folder / "rounds.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 + 2 * 3 + 2 * 3, (
        "the server learns in 3 rounds, clients practise in 3 and learn after each"
    )


def test_what_is_learned_is_what_the_best_sender_says_better(ended: Federation) -> None:
    """DualMinCE over the stores themselves, chat by chat: bits of the common text, strictly below the own."""
    server, place = ended.side(SERVER), ended.side(SERVER).place(2, "aligned")
    own = server.folder / "public" / server.state(2).name
    stores = [DistributionStore(path) for path in (own, place / "a", place / "b")]
    nats, _ = CommonText(stores)(range(len(stores[0])))
    tokens, counts = stores[0].column("tokens"), dict.fromkeys((*SIDES,), 0)
    for (mine, *theirs), length in zip(nats.astype(np.float32), tokens.tolist(), strict=True):
        best = min(theirs)
        counts[("a", "b")[theirs.index(best)] if best < mine else "server"] += length
    learned = ended.side(SERVER).at(2, LEARNED)
    assert learned is not None
    wins = json.loads((Path(learned.model) / "fusechat.json").read_text())["wins"]["all"]
    total = sum(counts.values())
    assert wins == pytest.approx({"pivot": counts["server"] / total, **{n: counts[n] / total for n in ("a", "b")}})
    assert wins["a"] + wins["b"] > 0, "otherwise nothing is compared here"


def test_a_side_reads_its_own_folder_and_messages_alone(
    small: Small, ended: Federation, at_the_server: Federation, tmp_path: Path
) -> None:
    shutil.copytree(at_the_server.folder, tmp_path / "out")
    alone = small.federation(tmp_path / "out", rounds=3)
    for name, round, others in ((SERVER, 3, ("a", "b")), ("a", 4, (SERVER, "b"))):
        for other in others:
            (alone.folder / "sides" / other).rename(tmp_path / other)
        alone.part(name, round)
        for other in others:
            (tmp_path / other).rename(alone.folder / "sides" / other)
    mutual(alone)
    assert all(distance(*pair) == 0 for pair in zip(models(ended.folder), models(alone.folder), strict=True))


def test_a_round_goes_on_without_those_who_fail_or_are_late(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = small.federation(tmp_path / "out")

    def start(name: str, round: int) -> None:
        if name == "a" and round == 1:
            raise TimeoutError("it slept")
        if name == "b":
            raise UserError("it has left")
        made.part(name, round)

    (record,) = mutual(made, start)
    assert (record["clients"], record["missing"]) == ([], {"a": "it slept", "b": "it has left"})
    assert "round 1 goes on without a: it slept" in caplog.text
    assert not (made.folder / "b").exists() and not (made.folder / SERVER).exists(), "who learned nothing has no model"
    assert (made.folder / "a").exists(), "who comes back takes in what the server has said"


def test_a_killed_run_goes_on_with_its_round(small: Small, ended: Federation, tmp_path: Path) -> None:
    """SIGKILL where the server of round 2 begins to train: three rounds end as if nothing had happened."""
    out, command = tmp_path / "out", tmp_path / "run.py"
    command.write_text(
        "import os, sys\nfrom pathlib import Path\nimport fusechat.mutual.sides as sides\n"
        "from fusechat.mutual import mutual\nfrom tests.mutual.conftest import Small\ntrain = sides.train\n"
        "def killed(*given, **options):\n    at = 'sides/server/round-02' in str(given[3])\n"
        "    return os.kill(os.getpid(), 9) if at else train(*given, **options)\nsides.train = killed\n"
        f"mutual(Small(Path({str(small.root)!r})).federation(Path({str(out)!r}), rounds=3))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(command)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = small.federation(out, rounds=3)
    before = {name: again.done(name, round).stat().st_mtime_ns for name in ("a", "b") for round in (1, 2)}
    assert (out / "rounds/01.json").exists() and not (out / "rounds/02.json").exists()
    mutual(again)
    assert before == {name: again.done(name, round).stat().st_mtime_ns for name in ("a", "b") for round in (1, 2)}
    assert all(distance(*pair) == 0 for pair in zip(models(ended.folder), models(out), strict=True))


def test_weights_that_no_later_round_reads_are_removed_and_come_again(
    small: Small, ended: Federation, tmp_path: Path
) -> None:
    """Of three rounds the last one's are there; a run of fewer rounds makes its own again, bit by bit."""
    for name in SIDES:
        states = {(r, s): ended.side(name).at(r, s) for r in (1, 2, 3, 4) for s in (LEARNED, PRACTISED)}
        assert [at[0] for at, state in states.items() if state and state.has_weights] in ([3], [3, 3, 4])
        assert all((state.adapter / "adapter_model.safetensors").exists() for state in states.values() if state)  # type: ignore[operator]
    shutil.copytree(ended.folder, tmp_path / "more")
    mutual(small.federation(tmp_path / "more", rounds=1))
    mutual(small.federation(tmp_path / "once", rounds=1))
    for name in ("a", "b"):
        files = [tmp_path / run / name / "model.safetensors" for run in ("more", "once")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_end_is_told(small: Small, ended: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(ended.folder, tmp_path / "out")
    caplog.set_level("INFO")
    records = mutual(small.federation(tmp_path / "out", rounds=3))
    sent = sum(sum(record["bytes"].values()) for record in records)
    last = caplog.messages[-1]
    assert last.startswith("fedmkt: 3 rounds of a server and 2 clients; ")
    assert f"{sent:,} bytes sent, in " in last and last.endswith(f"models in {tmp_path / 'out'}")
    assert f"{tmp_path / 'out'}: begun before with the same settings, goes on after round 3" in caplog.messages


def test_what_every_side_would_stop_at_claims_nothing(small: Small, tmp_path: Path) -> None:
    chat = {"template": "native", "max_length": 4096, "end_of_turn": True}
    with pytest.raises(UserError, match=r"chat.max_length=4096 exceeds the context of .*; set chat.max_length=\d+"):
        mutual(small.federation(tmp_path / "out", chat=chat))
    made = small.federation(tmp_path / "out")
    for client, message in (
        (
            Client(made.clients["a"].path, str(tmp_path / "no.jsonl")),
            r"mutual.clients.a.chats: .*no.jsonl does not exist",
        ),
        (Client(str(tmp_path / "no"), made.clients["a"].chats), r"mutual.clients.a.path=.*/no does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            mutual(replace(made, clients={"a": client}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["pivot.path", "mutual.clients.a.path"])
def test_a_gguf_file_is_no_side_and_claims_nothing(role: str, small: Small, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    made, packed = small.federation(tmp_path / "out"), str(tmp_path / "model.gguf")
    other = replace(made, server=packed) if role == "pivot.path" else replace(made, clients={"a": Client(packed)})
    with pytest.raises(
        UserError, match=f"{role}={packed} is a GGUF file, .* has to be a Hugging Face directory; write"
    ):
        mutual(other)
    assert not (tmp_path / "out").exists()


def test_public_chats_that_are_not_there_claim_nothing(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        mutual(small.federation(tmp_path / "out", public=str(tmp_path / "nothing.jsonl")))
    assert not (tmp_path / "out").exists()


def test_more_rounds_go_on_and_other_settings_are_refused(small: Small, ended: Federation, tmp_path: Path) -> None:
    shutil.copytree(ended.folder, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"holds a mutual training made with other settings \(terms.seed: 0 there, 1 now\)"
    ):
        mutual(small.federation(tmp_path / "out", rounds=3, seed=1))
    fewer = small.federation(tmp_path / "out", rounds=2)
    assert [record["round"] for record in mutual(fewer)] == [1, 2]
    state = ended.side("a").at(3, LEARNED)
    assert state is not None
    taken = load_file(f"{state.model}/model.safetensors")
    assert distance(load_file(tmp_path / "out/a/model.safetensors"), taken) == 0, "of two rounds, not of three"


def test_settings_of_averaging_decide_nothing_where_nothing_is_averaged(
    small: Small, ended: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what an earlier version began, which counted them, is gone on with."""
    other = small.federation(tmp_path, rounds=3, average="ties", average_settings={"density": 0.5})
    assert other.mark == ended.mark
    averaged = [small.federation(tmp_path, "fedavg", average=name).mark for name in ("linear", "ties")]
    assert averaged[0] != averaged[1]
    shutil.copytree(ended.folder, tmp_path / "out")
    with monkeypatch.context() as before:
        before.setattr(federation, "AVERAGING", ())
        then = small.federation(tmp_path, rounds=3, average="varm", average_settings={"granularity": "matrix"}).mark
    record = read_json(tmp_path / "out/fusechat.json")
    write_json(tmp_path / "out/begun.json", {**stamp(then), "stage": "mutual"})
    write_json(tmp_path / "out/fusechat.json", {**record, **stamp(fingerprint(round=3, of=str(then)))})
    earlier = small.federation(tmp_path / "out", rounds=3)
    monkeypatch.setattr(Federation, "part", lambda *given: pytest.fail("nothing is to do"))
    assert len(mutual(earlier)) == 3
    with pytest.raises(UserError, match=r"made with other settings \(.*terms.seed: 0 there, 1 now"):
        mutual(small.federation(tmp_path / "out", rounds=3, seed=1))


def test_names_that_are_refused(small: Small, tmp_path: Path) -> None:
    made = small.federation(tmp_path)
    with pytest.raises(UserError, match=r"mutual.clients: 'server' is a folder's name here; call the client otherwise"):
        Federation("fedmkt", made.server, {"server": made.clients["a"]}, tmp_path, made.terms)
    with pytest.raises(UserError, match=r"mutual.clients is empty; name at least one"):
        Federation("fedmkt", made.server, {}, tmp_path, made.terms)
    with pytest.raises(UserError, match=r"mutual.method='fed' is unknown; use one of: "):
        small.federation(tmp_path, "fed")
