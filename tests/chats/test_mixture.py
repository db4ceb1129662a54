"""Mixtures: which chats of each part are taken, in which order, and that every command and model takes the same."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fusechat.app.errors import UserError
from fusechat.app.outputs import fingerprint
from fusechat.chats.formats import load_chats
from fusechat.chats.mixture import Part, parts_of, paths_of, shares, sizes_of
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini, composed


def write(path: Path, count: int, tag: str = "") -> Path:
    """So many chats, each with its number."""
    turns = [
        [{"role": "user", "content": f"{path.stem} {i}?"}, {"role": "assistant", "content": str(i)}]
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": chat, "tag": tag}) + "\n" for chat in turns))
    return path


def questions(rows: Any) -> list[str]:
    return [chat[0]["content"] for chat in rows["messages"]]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [str(write(tmp_path / f"{name}.jsonl", count)) for name, count in (("ten", 10), ("twenty", 20), ("five", 5))]


def test_a_list_is_all_chats_of_all_files_in_order(files: list[str]) -> None:
    rows, found = load_chats(files)
    assert found == "messages"
    assert questions(rows) == [
        f"{name} {i}?" for name, n in (("ten", 10), ("twenty", 20), ("five", 5)) for i in range(n)
    ]
    assert sizes_of(rows) == {"ten": 10, "twenty": 20, "five": 5}
    assert rows["id"] == [id for file in files for id in load_chats(file)[0]["id"]]
    assert questions(load_chats(files, limit=12)[0]) == questions(rows)[:12]
    assert questions(load_chats(files, limit=99)[0]) == questions(rows)


def test_rows_are_drawn_by_content_and_seed(files: list[str], tmp_path: Path) -> None:
    """Whatever the order in the file is; fewer rows are some of more; they keep the file's order."""
    draw = lambda rows, seed=0, file=files[1]: questions(load_chats([{"path": file, "rows": rows}], seed=seed)[0])
    twelve, seven = draw(12), draw(7)
    assert len(set(twelve)) == 12
    assert set(seven) < set(twelve)
    assert twelve == sorted(twelve, key=lambda text: int(text.split()[1][:-1]))
    assert draw(7) == seven != draw(7, seed=1)
    lines = Path(files[1]).read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines) + "\n")
    assert sorted(draw(7, file=str(tmp_path / "shuffled.jsonl"))) == sorted(seven)
    assert draw(20) == questions(load_chats(files[1])[0])


def test_weights_are_shares_of_as_many_as_there_are(files: list[str]) -> None:
    given = [{"path": path, "weight": weight} for path, weight in zip(files, (2, 1, 0.5), strict=True)]
    rows, _ = load_chats(given)
    assert sizes_of(rows) == {"ten": 10, "twenty": 5, "five": 2}
    part = lambda weight: Part("", "x", None, weight, {})
    assert shares([part(0.1), part(0.2), part(0.7)], [100, 200, 700]) == [100, 200, 700]
    assert shares([part(1 / 3), part(2 / 3)], [1000, 2000]) == [1000, 2000]


def test_parts_have_names_formats_and_tags(files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a?", "response": "b"}) + "\n")
    tagged = write(tmp_path / "tagged.jsonl", 2, tag="mathematics")
    given = [
        {"path": str(other), "name": "own", "format": "prompt_response"},
        str(tagged),
        {"path": files[0], "rows": 3},
    ]
    with caplog.at_level(logging.INFO, "fusechat.chats.mixture"):
        rows, found = load_chats(given)
    assert found == "prompt_response, messages"
    assert rows["tag"] == ["own", "mathematics", "mathematics", "ten", "ten", "ten"]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"own: 1 of 1 chats of {other}",
        f"tagged: 2 of 2 chats of {tagged}",
        f"ten: 3 of 10 chats of {files[0]}",
    ]
    assert paths_of(given) == [str(other), str(tagged), files[0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"path": "five", "rows": 6}], r"chat\.path: five holds 5 chats and rows=6 is more; give 5 or fewer"),
        (
            ["five", {"path": "ten", "weight": 1}],
            r"chat\.path: ten has a weight and five has none; give all of them one",
        ),
        ([{"path": "five", "rows": 1, "weight": 1}], r"five\.jsonl has rows=1 and weight=1; give one of them"),
        ([{"path": "five", "rows": 0}], r"rows=0 of .*five\.jsonl: expected a whole number from 1 on"),
        ([{"path": "five", "weight": -1}], r"weight=-1 of .*five\.jsonl: expected a number above 0"),
        ([{"path": "ten", "weight": 100}, {"path": "five", "weight": 1}], r"weight=1 gives five no chat; give it more"),
        ([{"path": "five", "row": 2}], r"a part has no key 'row'; did you mean rows\?; keys: path, name, rows, weight"),
        ([{"path": "five", "name": ["a"]}], r"name=\['a'\] of .*five\.jsonl: expected a name"),
        ([{"rows": 2}], r"the part \{'rows': 2\} has no path; give \{path: FILE, rows: 1000\}"),
        (["five", "five"], r"two parts are called 'five'; give each a name"),
        (["five", "empty"], r"empty\.jsonl is empty; see chat\.path"),
        ([], r"chat\.path is an empty list; give files, folders or Hub ids"),
    ],
    ids=str,
)
def test_what_is_no_mixture(given: list[Any], message: str, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    at = lambda name: f"{tmp_path}/{name}.jsonl"
    real = [
        at(each) if isinstance(each, str) else {k: at(v) if k == "path" else v for k, v in each.items()}
        for each in given
    ]
    with pytest.raises(UserError, match=message):
        load_chats(real)


def test_every_stage_takes_the_same_mixture(
    mini: Mini, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Stores of two models hold the same rows; the target's card names the parts; another seed is another store."""
    chats = mini.experiment / "world/chats"
    mixture = f"[{{path:{chats}/fusion.jsonl,rows:40,name:noisy}},{chats}/validation.jsonl]"
    world = Mini(tmp_path, f"chat.path={mixture}", "validation.path=null", "trainer.max_steps=1")
    world.experiment.mkdir(parents=True)
    (world.experiment / "world").symlink_to(mini.experiment / "world")
    for source in ("pivot", "a"):
        world.run("extract", f"source={source}")
    stores = [DistributionStore(world.experiment / "distributions" / source) for source in ("pivot", "a")]
    assert [store.manifest["parts"] for store in stores] == [{"noisy": 40, "validation": 16}] * 2
    ids = [[store.text(i, "id") for i in range(len(store))] for store in stores]
    assert ids[0] == ids[1]
    assert stores[0].manifest["chats"] == fingerprint(ids=ids[0], parts={"noisy": 40, "validation": 16})
    world.run("align", "source=a")
    world.run("train", "source=a", f"validation.path=[{chats}/test.jsonl,{chats}/validation.jsonl]")
    assert "16 of 40 chats of validation.path are trained on too: held out is less than it says" in caplog.text
    assert "Chats: noisy 40, validation 16." in (world.experiment / "targets/a/README.md").read_text()
    world.run("preview", "source=pivot", "preview.show=1")
    assert " 56 " in capsys.readouterr().out
    model, tests = f"{world.experiment}/targets/a", f"[{chats}/test.jsonl,{{path:{chats}/validation.jsonl,rows:4}}]"
    world.run("evaluate", f"model={model}", f"evaluation.chats={tests}", "evaluation.generate=false")
    with pytest.raises(UserError, match=r"evaluation\.chats: chat\.path: test holds 24 chats and rows=25 is more"):
        world.run("evaluate", f"model={model}", f"evaluation.chats=[{{path:{chats}/test.jsonl,rows:25}}]")
    file = next((world.experiment / "evaluation").glob("*.json"))
    drawn = lambda: [sample["id"] for sample in json.loads(file.read_text())["samples"]]
    first, again = drawn(), ["evaluate", f"model={model}", f"evaluation.chats={tests}", "evaluation.generate=false"]
    assert len(first) == 24 + 4
    world.run(*again, "chat.seed=1")
    assert drawn() == first, "runs of other chats have one test set"
    world.run(*again, "evaluation.chats_seed=1")
    assert drawn()[:24] == first[:24]
    assert drawn()[24:] != first[24:]
    with pytest.raises(UserError, match=r"chats"):
        world.run("extract", "source=pivot", "chat.seed=1")


def test_one_path_keeps_its_fingerprint(mini: Mini) -> None:
    store = DistributionStore(mini.experiment / "distributions/pivot")
    assert "parts" not in store.manifest
    ids = load_chats(mini.experiment / "world/chats/fusion.jsonl")[0]["id"]
    assert store.manifest["chats"] == fingerprint(ids=list(ids))


def test_the_papers_nine_sets(tmp_path: Path) -> None:
    """In their published sizes, and a hundredth of each read: named by tags, as many of each as the paper says."""
    cfg = composed(
        "train", ["experiment=fusechat_7b_varm", "chat=fusechat_sets", "source=nh2_solar", f"paths.root={tmp_path}"]
    )
    chat = OmegaConf.to_container(cfg.chat, resolve=True)
    assert (chat["template"], chat["max_length"], chat["seed"]) == ("pivot", 2048, 0)
    given = {part.name: part.rows for part in parts_of(chat["path"])}
    whole = {"capybara": 16_000, "no_robots": 9_500, "sharegpt_gpt4": 6_200}
    sampled = {"orca_best": 20_000, "oasst_top1": 5_000}
    sampled |= dict.fromkeys(("metamathqa", "oss_instruct", "evol_alpaca", "python_code"), 10_000)
    assert given == sampled | dict.fromkeys(whole)
    assert sum((sampled | whole).values()) == 96_700
    (tmp_path / "sets").mkdir()
    for part in chat["path"]:
        assert part["path"] == str(
            write(tmp_path / f"sets/{part['name']}.jsonl", whole.get(part["name"], 21_000) // 100)
        )
    less = [part | ({"rows": part["rows"] // 100} if "rows" in part else {}) for part in chat["path"]]
    rows, _ = load_chats(less, seed=chat["seed"])
    assert sizes_of(rows) == {name: size // 100 for name, size in (sampled | whole).items()}
    assert {*rows["tag"]} == {*given}
