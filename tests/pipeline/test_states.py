"""What a dry run and `fusechat status` say of outputs is what the stages themselves go by."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusechat import status
from fusechat.app import failures
from fusechat.app.command import CONF
from fusechat.app.errors import UserError
from fusechat.app.locks import held, holder
from fusechat.app.outputs import read_json, write_json
from fusechat.app.states import state_of
from fusechat.new.planned import _epochs as epochs_of
from fusechat.pipeline.configs import composer
from fusechat.pipeline.steps import parse
from fusechat.pipeline.table import Row, print_plan, rows_of, size_of, summary
from tests.conftest import ROOT, Mini
from tests.pipeline.conftest import FINISHED

TARGET = "${paths.experiment}/targets/a"
STEPS = ["tiny", "extract source=pivot,a", "align source=a", "train source=a"]
STEPS += [f"evaluate evaluation.generate=false evaluation.limit=4 model={TARGET}", "report"]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    """Hydra as it is inside a command."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        yield


def rows(world: Mini, *overrides: str, of: str = "") -> dict[str, Row]:
    """of: the verb whose steps alone are looked at; composing takes a while."""
    found = rows_of(
        [parse(line) for line in STEPS if line.startswith(of)], composer(world.all(*overrides)), world.experiment
    )
    return {row.output: row for row in found}


def kinds(world: Mini, *overrides: str, of: str = "") -> dict[str, str]:
    return {name: row.state.kind for name, row in rows(world, *overrides, of=of).items()}


def test_what_is_finished_is_done(finished: Mini) -> None:
    found = rows(finished)
    assert {name: row.state.kind for name, row in found.items()} == dict.fromkeys(FINISHED, "done")
    assert all(row.bytes for row in found.values())
    assert summary([*found.values()], finished.experiment) == "10 done; nothing is left to do"


@pytest.mark.parametrize(
    ("output", "verb", "override", "why"),
    [
        ("distributions/a", "extract", "extract.top_k=5", "extract.top_k: 10 there, 5 now"),
        ("distributions/a", "extract", "chat.max_length=99", "max_length: 256 there, 99 now"),
        ("distributions/a", "extract", "store.logprobs=uint8", 'store.logprobs: "float16" there, "uint8" now'),
        ("aligned/a", "align", "token_map=ms", 'token_map: "prefix" there, "ms" now'),
        ("aligned/a", "align", "alignment.unmatched=gold", 'unmatched: "skip" there, "gold" now'),
        ("targets/a", "train", "loss.lm_weight=0.75", "loss.lm_weight: 0.5 there, 0.75 now"),
        ("targets/a", "train", "data.shuffle_seed=7", "data.shuffle_seed: 0 there, 7 now"),
        ("targets/a", "train", "optimizer.betas=[0.5,0.9]", "optimizer.betas: [0.9, 0.999] there, [0.5, 0.9] now"),
    ],
)
def test_what_is_stale_is_what_the_stage_refuses(
    finished: Mini, output: str, verb: str, override: str, why: str
) -> None:
    state = rows(finished, override, of=verb)[output].state
    assert (state.kind, state.told) == ("stale", why)
    with pytest.raises(UserError, match=re.escape(why)):
        finished.run(verb, "source=a", override)


def test_what_decides_nothing_makes_nothing_stale(finished: Mini) -> None:
    beside = [
        "trainer.log_every_n_steps=3",
        "data.batch_size=2",
        "extract.trainer.devices=auto",
        "callbacks.progress_bar=true",
    ]
    assert set(kinds(finished, *beside).values()) == {"done"}


def test_evaluations_of_other_settings_and_other_weights_are_stale(finished: Mini, world: Mini) -> None:
    found = rows(finished, "evaluation.max_new_tokens=3")
    told = found["evaluation/targets-a.json"].state.told
    assert told == "evaluation.max_new_tokens: 16 there, 3 now"
    assert (found["report"].state.kind, found["targets/a"].state.kind) == ("stale", "done")
    config = world.experiment / "targets/a/generation_config.json"
    config.write_text(config.read_text() + " ")
    assert 'model: "' in rows(world, of="evaluate")["evaluation/targets-a.json"].state.told


def test_what_follows_from_what_is_missing_is_stale(world: Mini) -> None:
    shutil.rmtree(world.experiment / "aligned/a")
    found = rows(world)
    assert found["aligned/a"].state.kind == "to do"
    assert found["targets/a"].state.told == f"{world.experiment}/aligned/a is not done"
    assert found["evaluation/targets-a.json"].state.kind == "stale"
    (world.experiment / "estimates.json").write_text(
        json.dumps({"outputs": {"aligned/a": {"seconds": 90, "bytes": 2e6}}})
    )
    told = summary([*rows(world).values()], world.experiment)
    assert told.startswith("6 done, 1 to do, 3 stale; left, beside 3 not estimated: about 1.5 min, and about ")


def test_running_stopped_and_failed(world: Mini) -> None:
    target = world.experiment / "targets/b"
    with held(target):
        running = state_of(target)
        assert running.kind == "running"
        assert f"pid {os.getpid()}" in running.told
        lock = (target.parent / ".b.lock").read_text()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (target.parent / ".b.lock").write_text("\n".join([str(dead.pid), *lock.split("\n")[1:]]))
    (world.experiment / "checkpoints/b-0123456789abcdef").mkdir(parents=True)
    (world.experiment / "checkpoints/b-0123456789abcdef/step=40.ckpt").touch()
    assert holder(target) is not None
    ended = f"its process {dead.pid} has ended without a word; a checkpoint of step 40 is kept"
    assert (state_of(target).kind, state_of(target).told) == ("stopped", ended)
    cfg = world.cfg("train", "source=b")
    failures.note(cfg, "the loss is NaN", "python train.py source=b")
    failures.note(world.cfg("train", "source=a"), "refused", "python train.py source=a")
    known = failures.last(Path(cfg.paths.logs))
    failed = state_of(target, known[str(target.resolve())])
    assert failed.kind == "failed"
    assert failed.told.endswith(": the loss is NaN; a checkpoint of step 40 is kept")
    made = world.experiment / "targets/a"
    assert state_of(made, known[str(made.resolve())]).kind == "done", "what is there counts more"


def test_unfinished_stores_and_evaluations_tell_what_is_kept(world: Mini) -> None:
    store = world.experiment / "distributions/a"
    (store / "manifest.json").unlink()
    for index in range(2):
        (store / f"shard-{index:05d}.json").touch()
    assert (state_of(store).kind, state_of(store).told) == ("stopped", "2 of 3 shards are whole")
    result = world.experiment / "evaluation/other.json"
    result.with_name("other.0123456789abcdef.part").write_text("{}\n{}\n")
    assert (state_of(result).kind, state_of(result).told) == ("stopped", "2 samples are measured")
    assert {"distributions/a", "evaluation/other.json"} <= {
        str(path.relative_to(world.experiment)) for path in status.outputs_of(world.experiment)
    }


def test_damaged_records_are_told(world: Mini) -> None:
    record = world.experiment / "distributions/a/manifest.json"
    record.write_text(record.read_text()[:100])
    assert state_of(record.parent).kind == "failed"
    assert "damaged" in state_of(record.parent).told


def test_a_dry_run_imports_nothing_heavy_and_writes_no_output(finished: Mini) -> None:
    outputs = lambda: {path for path in finished.root.rglob("*") if not {"logs", "outputs"} & {*path.parts}}
    before = outputs()
    steps = ",".join(f"'{line}'" for line in STEPS).replace("${", "\\${")
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "fusechat.pipeline",
        *finished.all(f"pipeline.steps=[{steps}]"),
    ]
    done = subprocess.run([*command, "pipeline.dry_run=true"], cwd=ROOT, text=True, capture_output=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hydra" in loaded and not loaded & {"torch", "transformers", "lightning", "datasets", "numpy"}
    assert done.stdout.splitlines()[-1] == "10 done; nothing is left to do"
    assert outputs() == before


def test_old_results_without_parts_are_done(world: Mini) -> None:
    file = world.experiment / "evaluation/targets-a.json"
    content: dict[str, Any] = json.loads(file.read_text())
    for key in ("decided_by", "checksum"):
        del content[key]
    file.write_text(json.dumps(content))
    assert kinds(world, of="evaluate") == {"evaluation/targets-a.json": "done"}


def test_a_store_of_other_chats_is_stale_and_a_limit_beyond_all_is_none(finished: Mini, world: Mini) -> None:
    of = {
        name: rows(world, override, of="extract")["distributions/a"].state
        for name, override in {
            "less": "chat.limit=5",
            "all": "chat.limit=96",
            "more": "chat.limit=5000",
            "seed": "chat.seed=3",
        }.items()
    }
    assert {name: state.kind for name, state in of.items()} == {
        "less": "stale",
        "all": "done",
        "more": "done",
        "seed": "done",
    }
    assert of["less"].told == "chat.limit: null there, 5 now"
    manifest = world.experiment / "distributions/a/manifest.json"
    content = read_json(manifest)
    write_json(manifest, {**content, "chat": {**content["chat"], "limit": 96}})
    assert rows(world, of="extract")["distributions/a"].state.told == "chat.limit: 96 there, null now"
    assert rows(world, "chat.limit=96", of="extract")["distributions/a"].state.kind == "done"
    with pytest.raises(UserError, match="chats: "):
        world.run("extract", "source=a", "chat.limit=5")


def test_what_an_experiment_of_ones_own_will_take(world: Mini) -> None:
    """Without the file of `new` its own models and chats tell, as they do there; what they do not tell has a reason."""
    for place in ("distributions", "aligned", "targets", "evaluation", "report"):
        shutil.rmtree(world.experiment / place)
    chats, models = world.experiment / "world/chats", world.experiment / "world/models"
    found = {name: row for name, row in rows(world).items() if row.state.kind != "done"}
    assert all(row.bytes and row.seconds is not None and not row.unknown for row in found.values())
    assert found["evaluation/targets-a.json"].bytes == 400 * 4, "evaluation.limit of them"
    more = rows(world, "trainer.max_steps=2", "extract.top_k=5")
    kept = [rows_["distributions/a"].bytes for rows_ in (found, more)]
    assert 1.5 < kept[0] / kept[1] < 2, "half as many are kept of each position"
    shutil.rmtree(models / "a")
    more = rows(world)
    assert more["distributions/a"].unknown == [f"a: {models}/a is not on this disk"]
    assert more["distributions/a"].seconds is None and more["distributions/pivot"].seconds is not None
    (chats / "fusion.jsonl").rename(chats / "gone.jsonl")
    row = rows(world)["distributions/pivot"]
    assert (row.bytes, row.seconds) == (None, None)
    assert row.unknown[-1] == f"chat.path: {chats}/fusion.jsonl is not on this disk"


@pytest.mark.parametrize(
    ("given", "steps", "epochs"), [(3, -1, 3), (3, 6, 0.5), (3, 600, 3), (3, None, 3), (-1, 24, 2), (None, -1, 3)]
)
def test_how_often_a_training_sees_the_chats(given: int | None, steps: int | None, epochs: float) -> None:
    train = {"trainer": {"max_epochs": given, "max_steps": steps}, "data": {"global_batch": 8}}
    assert epochs_of([("extract", {}), ("train", train)], 96) == epochs


def test_reasons_stand_below_the_plan(world: Mini, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(world.experiment / "distributions/a")
    shutil.rmtree(world.experiment / "world/models/pivot")
    print_plan([*rows(world, of="extract").values()], world.experiment)
    summed, why, _ = capsys.readouterr().out.splitlines()[-3:]
    assert why == f"not estimated: pivot: {world.experiment}/world/models/pivot is not on this disk"
    assert "; left: an unknown time, and about " in summed


def test_room_is_told_of_what_is_stale_and_what_is_to_be_trained(world: Mini) -> None:
    stale = rows(world, "loss.lm_weight=0.75", of="train")["targets/a"]
    assert stale.bytes == size_of(world.experiment / "targets/a")
    shutil.rmtree(world.experiment / "targets/a")
    weights = (world.experiment / "world/models/pivot/model.safetensors").stat().st_size
    assert rows(world, of="train")["targets/a"].bytes == weights
    config = world.experiment / "world/models/pivot/config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    assert rows(world, of="train")["targets/a"].bytes == 2 * weights
