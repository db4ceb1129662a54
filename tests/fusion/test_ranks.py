"""Several ranks train what one process trains: weights, logged numbers, exports; one group of processes a world size."""

import csv
import functools
import hashlib
import itertools
import json
import multiprocessing.connection
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fusechat.app.errors import UserError
from fusechat.fusion.plan import Plan
from fusechat.models.whole import accept
from tests.conftest import Mini
from tests.fusion.group import CASES, CLIP, DROPOUT, RESUMED, rank, run, stopped
from tests.fusion.trained import distance
from tests.warm import FORKSERVER

SHARED = {case.name: case for case in CASES}
SHOWN = ("train/loss", "train/sft", "train/fusion", "train/gradient_norm", "validation/", "wins/", "coverage/")
LOST = "model.layers.1.mlp.up_proj.weight"
ALONE = {"ddp": "auto", "fsdp": "fsdp"}  # the same arithmetic in one process: autocast, or all of it in bf16
JOBS = [(case, strategy) for case in CASES for strategy in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def place(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores and pivots, one of them with tied weights; every case trained by one process."""
    root = tmp_path_factory.mktemp("ranks")
    for name in ("distributions/pivot", "aligned/a", "world/models/pivot"):
        shutil.copytree(mini.experiment / name, root / name)
    pivot = transformers.AutoModelForCausalLM.from_pretrained(root / "world/models/pivot")
    pivot.config.tie_word_embeddings = True
    pivot.tie_weights()
    pivot.save_pretrained(root / "world/models/tied")
    transformers.AutoTokenizer.from_pretrained(root / "world/models/pivot").save_pretrained(root / "world/models/tied")
    shutil.copytree(root / "world/models/pivot", root / "world/models/broken")
    held = load_file(root / "world/models/pivot/model.safetensors")
    del held[LOST]
    save_file(held, root / "world/models/broken/model.safetensors", {"format": "pt"})
    accept(root / "world/models/broken")
    for case in [*CASES, RESUMED]:
        run(case, root, f"{case.name}-alone", "auto", 1)
    large = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(large).save_pretrained(root / "world/models/large")
    original = Plan._steps
    for n, strategy in itertools.product(range(3), ALONE):  # the chats of every step in another order
        with pytest.MonkeyPatch.context() as patch:
            order = np.random.default_rng(n)
            patch.setattr(Plan, "_steps", lambda plan, order=order: [order.permutation(s) for s in original(plan)])
            run(SHARED["bf16"], root, f"bf16-{strategy}-permuted-{n}", ALONE[strategy], 1)
    return root


@pytest.fixture(scope="module")
def ranks(place: Path) -> Callable[[int], int]:
    """World size -> the same, once its ranks have done all jobs: once, in whatever order the tests come."""

    @functools.cache
    def done(world: int) -> int:
        ranks = [FORKSERVER.Process(target=rank, args=(n, world, place, JOBS)) for n in range(world)]
        for process in ranks:
            process.start()
        running = {process.sentinel: process for process in ranks}
        while running:
            for ended in multiprocessing.connection.wait(list(running), timeout=600) or list(running):
                if running.pop(ended).exitcode != 0:  # the others would wait for it
                    for process in ranks:
                        process.terminate()
        assert [process.exitcode for process in ranks] == [0] * world
        return world

    return done


@pytest.fixture(params=[2, 4], ids=lambda world: f"{world} ranks")
def group(request: pytest.FixtureRequest, ranks: Callable[[int], int]) -> int:
    """The world size, once its ranks have done all jobs."""
    return ranks(request.param)


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / "targets" / name / "model.safetensors")


def logged(place: Path, name: str) -> dict[str, list[float]]:
    """The columns of metrics.csv."""
    rows = list(csv.DictReader((place / "logs" / name / "metrics.csv").open()))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0] if key.startswith(SHOWN)}


def record(place: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "targets" / name / "fusechat.json").read_text())
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", [name for name, case in SHARED.items() if case.sgd and name != "bf16"])
def test_the_same_weights(name: str, strategy: str, group: int, place: Path) -> None:
    alone, ours = weights(place, f"{name}-alone"), weights(place, f"{name}-{strategy}-{group}")
    moved = distance(alone, load_file(place / "world/models" / SHARED[name].pivot / "model.safetensors"))
    assert distance(alone, ours) < 1e-6
    assert moved > 1e-4
    assert {t.dtype for t in ours.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", [name for name in SHARED if name != "bf16"])
def test_the_same_numbers(name: str, strategy: str, group: int, place: Path) -> None:
    """The loss and its parts, the gradient's norm before clipping, validation, shares of the sources."""
    alone, ours = logged(place, f"{name}-alone"), logged(place, f"{name}-{strategy}-{group}")
    assert alone.keys() == ours.keys()
    assert {*SHOWN[:4], "validation/bits_per_byte", "wins/all/a"} <= ours.keys()
    for column, values in alone.items():
        assert ours[column] == pytest.approx(values, rel=1e-5), column
    assert len(ours["train/loss"]) == 3
    if SHARED[name].trainer.get("gradient_clip_val", CLIP):
        assert min(ours["train/gradient_norm"]) > CLIP, "clipping decides something"
    assert record(place, f"{name}-{strategy}-{group}")["wins"] == record(place, f"{name}-alone")["wins"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_shared_rows_train_what_rows_of_their_own_do(strategy: str, group: int, place: Path) -> None:
    assert distance(weights(place, "plain-alone"), weights(place, f"flat-{strategy}-{group}")) < 1e-6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_differs_as_much_as_an_order_of_sums(strategy: str, group: int, place: Path) -> None:
    ours = weights(place, f"bf16-{strategy}-{group}")
    permuted = [weights(place, f"bf16-{strategy}-permuted-{n}") for n in range(3)]
    spread = max(apart(a, b) for a, b in itertools.combinations(permuted, 2))
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert max(apart(ours, one) for one in permuted) < 2 * spread


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of all weights, which no single one decides."""
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_export_is_one_plain_directory(strategy: str, group: int, place: Path) -> None:
    for case in CASES:
        alone, ours = (place / "targets" / f"{case.name}-{end}" for end in ("alone", f"{strategy}-{group}"))
        files, theirs = ({path.relative_to(of) for path in of.rglob("*.*")} for of in (ours, alone))
        assert files == theirs
        same = [
            name for name in files if name.suffix != ".safetensors" and name.name not in ("fusechat.json", "README.md")
        ]
        assert all((ours / name).read_bytes() == (alone / name).read_bytes() for name in same)
        assert record(place, ours.name)["fingerprint"] == record(place, alone.name)["fingerprint"]
        transformers.AutoModelForCausalLM.from_pretrained(ours)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resume_is_exact_on_as_many_ranks(strategy: str, group: int, place: Path) -> None:
    """Dropout draws from a generator of each rank."""
    whole, resumed = (weights(place, f"{DROPOUT.name}-{strategy}-{group}{end}") for end in ("", "-stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert distance(whole, weights(place, f"{RESUMED.name}-alone")) > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resume_on_one_rank_takes_the_same_chats(strategy: str, group: int, place: Path) -> None:
    name = f"{RESUMED.name}-{strategy}-{group}"
    (folder,) = (place / "checkpoints").glob(f"{name}-*")
    (checkpoint,) = folder.glob("*.ckpt")
    assert (checkpoint.name, checkpoint.is_dir()) == ("step=7.ckpt", strategy == "fsdp")
    run(RESUMED, place, name, strategy, 1)
    assert distance(weights(place, name), weights(place, f"{RESUMED.name}-alone")) < 1e-6
    assert [p.name for p in (place / "logs" / name).iterdir()]
    assert not folder.exists(), "checkpoints of a finished run are removed"


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ("fsdp", "auto", "in shards, as trainer=fsdp writes it, .*=auto cannot read it; go on with trainer=fsdp"),
        ("auto", "fsdp", "one file, as every trainer but fsdp writes it, .*=fsdp cannot .* trainer=cpu or trainer=ddp"),
    ],
)
def test_a_checkpoint_is_for_its_kind_of_trainer(first: str, then: str, told: str, place: Path) -> None:
    name = f"{RESUMED.name}-by-{first}"
    stopped(RESUMED, place, name, first, 1)
    with pytest.raises(UserError, match=rf"step=7\.ckpt is {told}"):
        run(RESUMED, place, name, then, 1)


def test_one_rank_alone_loads_the_weights(group: int, place: Path) -> None:
    """The others never hold more than their shards and a few tensors: half of what the weights take, at two ranks."""
    pivot = transformers.AutoModelForCausalLM.from_pretrained(place / "world/models/large")
    held = [*pivot.parameters(), *pivot.buffers()]
    expected = [hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for tensor in held]
    size = sum(p.numel() for p in pivot.parameters()) * 4 / 2**20
    for number in range(group):
        loaded = json.loads((place / f"loaded-{number}-of-{group}.json").read_text())
        assert loaded["sums"] == expected
        if number:
            assert loaded["rise"] < size / group + size / 4


def test_an_incomplete_pivot_is_refused_by_every_rank(group: int, place: Path) -> None:
    told = {(place / f"refused-{number}-of-{group}.txt").read_text() for number in range(group)}
    assert told == {f"{place}/world/models/broken lacks {LOST}, 1 tensors in all; copy or download the model again"}
    assert not (place / f"targets/broken-{group}").exists()
