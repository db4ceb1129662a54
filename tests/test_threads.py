"""Threads: whoever sets their number gets it, nothing of ours changes it, and no result depends on what ran before.

At one number of threads everything is exact: every byte of a target and every figure of an evaluation. From one number
to another torch sums in another order; `test_between_thread_counts_tolerances_hold` says what is left then.
"""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher
from safetensors.torch import load_file

import fusechat
from fusechat.align import nearest, projection, sequence
from fusechat.app import threads
from fusechat.app.outputs import file_hash
from fusechat.merging.selection import most_varying
from fusechat.merging.slices import Slices
from tests.conftest import ROOT, Mini

RUN = """
import json, os, sys
from pathlib import Path
import datasets, lightning, numba, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from tests.conftest import Mini

def used():
    try:
        return [torch.get_num_threads(), numba.threading_layer()]
    except ValueError:  # so numba says that it has launched no threads
        return [torch.get_num_threads(), None]

world = Mini(Path(sys.argv[1]))
for number, stages in enumerate(json.loads(sys.argv[2])):
    if os.fork() == 0:  # imports are shared; nothing was computed before the fork
        seen = [used()]
        for stage in stages:
            world.run(*stage)
            seen.append(used())
        (world.root / f"seen{number}.json").write_text(json.dumps(seen))
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(f"failed: {stages}")
"""


class Stages:
    """Alignment, training, merge and evaluation in one process; then training and evaluation in processes of their own."""

    def __init__(self, world: Mini, count: int) -> None:
        self.world, targets = world, world.experiment / "targets"
        train = lambda name: ["train", "source=a", f"run_name={name}", "logger=none", "data.global_batch=32"]
        merged = f"model={world.experiment}/merged/ties"
        evaluate = lambda name: ["evaluate", merged, f"output_file={world.root}/{name}.json"]
        align = ["align", "source=a", "token_map=mined", "overwrite=true"]
        merge = ["merge", "merge=ties", f"targets=[{targets}/together,{world.experiment}/world/models/pivot]"]
        processes = [[align, train("together"), merge, evaluate("together")], [train("alone")], [evaluate("alone")]]
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "MKL_DYNAMIC": "FALSE"}  # also more than cores
        environment.pop("MKL_NUM_THREADS", None)
        command = [sys.executable, "-c", RUN, str(world.root), json.dumps(processes)]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        self.seen = [json.loads((world.root / f"seen{number}.json").read_text()) for number in range(3)]

    def weights(self, name: str) -> Path:
        return self.world.experiment / "targets" / name / "model.safetensors"

    def result(self, name: str) -> Any:
        content = json.loads((self.world.root / f"{name}.json").read_text())
        return content["metrics"], content["samples"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Stages]:
    """With one thread and with two, in a world wide enough for torch to share out its sums (from 32,768 elements on)."""
    wide = ["tiny.width=128", *(f"tiny.models.{name}.steps=1" for name in ("pivot", "a", "b", "c"))]
    first = Mini(tmp_path_factory.mktemp("threads") / "1", *wide)
    first.run("tiny")
    for source in ("pivot", "a"):
        first.run("extract", f"source={source}")
    second = Mini(first.root.with_name("2"), *wide)
    shutil.copytree(first.root, second.root)
    return {1: Stages(first, 1), 2: Stages(second, 2)}


@pytest.mark.parametrize("count", [1, 2])
def test_torch_keeps_its_threads_and_numba_launches_none(count: int, made: dict[int, Stages]) -> None:
    together, *alone = made[count].seen
    assert together == [[count, None]] * 5, "as OMP_NUM_THREADS says, before and after every stage"
    assert alone == [[[count, None]] * 2] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_training_does_not_depend_on_the_alignment_before_it(count: int, made: dict[int, Stages]) -> None:
    assert file_hash(made[count].weights("alone")) == file_hash(made[count].weights("together"))


@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_does_not_depend_on_the_merge_before_it(count: int, made: dict[int, Stages]) -> None:
    assert made[count].result("alone") == made[count].result("together")
    assert len(made[count].result("alone")[1]) == 24


def test_between_thread_counts_tolerances_hold(made: dict[int, Stages]) -> None:
    """Alignment counts and looks up: exact. What torch sums is not, and Adam divides by small sums."""
    shards = [sorted(stages.world.experiment.glob("aligned/a/*.arrow")) for stages in made.values()]
    assert [file_hash(file) for file in shards[0]] == [file_hash(file) for file in shards[1]]
    one, two = (load_file(stages.weights("together")) for stages in made.values())
    assert (
        max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-4
    )  # 3e-6 seen, at a learning rate of 1e-3
    one, two = (stages.result("together")[0]["bits_per_byte"]["all"]["value"] for stages in made.values())
    assert one == pytest.approx(two, rel=1e-5)  # 1.5e-8 seen


def ragged() -> projection.Ragged:
    logprobs = np.log(np.full(4, 0.25, np.float32))
    return projection.Ragged(np.array([2, 2]), np.array([0, 1, 1, 2]), logprobs, logprobs[:2])


POSITIONS, TABLE = np.array([0, 1]), np.array([0, 1, 2])
KERNELS: dict[str, Callable[[], object]] = {
    "count_scores": lambda: most_varying(Slices(torch.zeros(1 << 19), [torch.rand(1 << 19) for _ in range(2)]), 0.5),
    "_nearest": lambda: nearest.nearest([f"{n}a" for n in range(500)], [f"{n}b" for n in range(500)]),
    "_warp": lambda: sequence.dtw(["ab", "c"], ["a", "bc"]),
    "_match": lambda: sequence.align_offsets(np.array([0, 2, 3]), np.array([0, 1, 3])),
    "_gold_path": lambda: projection.gold_path(TABLE, TABLE, POSITIONS, POSITIONS),
    "_project": lambda: projection.project(
        ragged(), POSITIONS, TABLE, POSITIONS, np.full((2, 3), -1), 3, unmatched_gold=True
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_leaves_torchs_threads_alone(name: str) -> None:
    before = torch.get_num_threads()
    KERNELS[name]()
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="Threading layer is not initialized"):
        numba.threading_layer()


def test_no_kernel_is_compiled_for_numbas_own_threads() -> None:
    names = [module.name for module in pkgutil.walk_packages(fusechat.__path__, "fusechat.")]
    modules = [importlib.import_module(name) for name in names if name != "fusechat.mutual.flower"]  # has no kernel
    compiled = {
        name: kernel for module in modules for name, kernel in vars(module).items() if isinstance(kernel, Dispatcher)
    }
    assert KERNELS.keys() <= compiled.keys()
    assert not [name for name, kernel in compiled.items() if kernel.targetoptions.get("parallel")]


@pytest.mark.parametrize(("given", "wanted"), [("3", 3), ("2,4", 2), ("0", 1), ("", None), ("many", None)])
def test_the_number_of_threads_is_torchs_own_setting(given: str, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads.count() == (wanted or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("parts", [1, 5])
def test_work_is_shared_out_once_and_its_errors_come_back(parts: int) -> None:
    done: list[int] = []
    threads.share(done.append, parts)
    assert sorted(done) == list(range(parts))
    with pytest.raises(ZeroDivisionError):
        threads.share(lambda part: 1 // (part - parts + 1), parts)
