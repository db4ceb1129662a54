"""The stages that are disturbed, each on a world as small as it may be, run as its command in a forked process."""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.app.verbs import VERBS

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "experiment=tiny",
    "tiny.fusion_chats=40",
    "tiny.test_chats=16",
    "tiny.train_chats=64",
    "tiny.width=16",
    "tiny.layers=2",
    "tiny.heads=2",
    "tiny.models.pivot.steps=2",
    "tiny.models.a.steps=2",
    "~tiny.models.b",
    "~tiny.models.c",
    "extract.rows_per_shard=20",
    "extract.tokens_per_batch=1024",
    "trainer.max_steps=4",
    "data.global_batch=8",
    "data.validation_fraction=0.2",
    "callbacks.checkpoint_every_n_steps=2",
    "evaluation.max_new_tokens=2",
    "logger=none",
    "targets=[${paths.experiment}/targets/a,${paths.experiment}/targets/sft]",
]
HYDRA = ["hydra.output_subdir=null", *(f"hydra.{key}=${{paths.root}}/hydra" for key in ("run.dir", "sweep.dir"))]
HYDRA += ["hydra/job_logging=stdout", "hydra.sweep.subdir=."]
ASIDE = ("cache", "logs", "hydra")  # Hugging Face's cache and logs: no results


@dataclass(frozen=True)
class Stage:
    """A command; disturbed: also while faults are injected, else only to prepare the next."""

    name: str
    verb: str
    overrides: tuple[str, ...] = ()
    disturbed: bool = True


MODEL = "model=${paths.experiment}/targets/a"
STAGES = [
    Stage("tiny", "tiny"),
    Stage("extract", "extract", ("source=a",)),
    Stage("extract again, overwrite=true", "extract", ("source=a", "extract.top_k=5", "overwrite=true")),
    Stage("extract (the pivot)", "extract", ("source=pivot",), disturbed=False),
    Stage("align", "align", ("source=a",)),
    Stage("align (passed through)", "align", ("source=pivot",)),
    Stage("train", "train", ("source=a",)),
    Stage("train (sft)", "train", ("fusion=sft", "run_name=sft"), disturbed=False),
    Stage("merge", "merge", ("merge=varm",)),
    Stage("merge again, overwrite=true", "merge", ("merge=varm", "merge.dtype=bfloat16", "overwrite=true")),
    Stage("compress", "merge", ("merge=compress", "target=${paths.experiment}/targets/a", "merge.name=small")),
    Stage("search", "merge_search", ("search.trials=2", "search.methods=[linear]")),
    Stage("evaluate", "evaluate", (MODEL,)),
    Stage("evaluate (pivot)", "evaluate", ("model=${pivot.path}",), disturbed=False),
    Stage("report", "report"),
    Stage("compare", "compare", (
        "first=${paths.experiment}/evaluation/targets-a.json",
        "second=${paths.experiment}/evaluation/models-pivot.json",
        "output_file=${paths.experiment}/compared.csv",
    )),
]  # fmt: skip


def warm_up() -> None:
    """Imports what stages begin with, so that a forked process need not; the rest follows when one has ended."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    sys.path.insert(0, str(REPOSITORY))
    os.chdir(REPOSITORY)
    for module in ("torch", *{VERBS[stage.verb] for stage in STAGES}):
        importlib.import_module(module)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # built once


def compose_once(folder: Path) -> None:
    """Hydra composes each command's config once: half of the time of a stage as small as these. Kept in ``folder``."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    compose: Any = ConfigLoaderImpl.load_configuration

    def composed(*arguments: Any, **options: Any) -> Any:
        said = repr((arguments[1:], sorted(options.items())))
        file = folder / f"{hashlib.sha1(said.encode()).hexdigest()}.pickle"
        if not file.exists():
            file.write_bytes(pickle.dumps(compose(*arguments, **options)))
        return pickle.loads(file.read_bytes())

    ConfigLoaderImpl.load_configuration = composed  # type: ignore[method-assign]


class World:
    """A folder in which stages run; before and after hold copies of it around each undisturbed stage."""

    def __init__(self, folder: Path) -> None:
        self.root, self.copies = folder / "runs", folder / "copies"
        self.output, self.modules = folder / "output", folder / "modules"
        for place in (self.root, folder / "configs"):
            place.mkdir(parents=True)
        compose_once(folder / "configs")
        os.environ |= {"FUSECHAT_CACHE": str(folder / "memory"), "HF_HOME": str(self.root / "cache")}
        os.environ |= {"HF_DATASETS_CACHE": str(self.root / "cache/datasets")}

    def start(self, stage: Stage, first: Callable[[], None] = lambda: None) -> int:
        """Forks a process that calls ``first`` and then runs the stage's command; returns its id."""
        if pid := os.fork():
            return pid
        code = 99
        gc.disable()
        try:
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.argv = [stage.verb, *SMALL, *stage.overrides, f"paths.root={self.root}", *HYDRA]
            first()
            importlib.import_module(VERBS[stage.verb]).main()
            code = 0
            self.modules.write_text("\n".join(sys.modules))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, stage: Stage) -> int:
        """Runs a stage undisturbed; returns its exit code."""
        return exit_code(os.waitpid(self.start(stage), 0)[1])

    def learn(self) -> None:
        """Imports what the last stage has imported, so that those to come need not."""
        for name in self.modules.read_text().splitlines():
            with suppress(ImportError):
                importlib.import_module(name)

    def said(self) -> str:
        """What the last stage has printed."""
        return self.output.read_text(errors="replace")

    def keep(self, name: str) -> None:
        """Copies the folder."""
        shutil.copytree(self.root, self.copies / name)

    def restore(self, name: str) -> None:
        """Makes the folder what it was."""
        for place in self.root.iterdir():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        shutil.copytree(self.copies / name, self.root, dirs_exist_ok=True)

    def files(self) -> dict[str, str]:
        """Relative path -> hash of the content, without caches and logs."""
        found = (f for f in sorted(self.root.rglob("*")) if f.is_file())
        places = ((f, f.relative_to(self.root)) for f in found)
        return {
            str(p): hashlib.sha1(f.read_bytes()).hexdigest()
            for f, p in places
            if p.parts[0] not in ASIDE and "logs" not in p.parts
        }


def exit_code(status: int) -> int:
    """As a shell has it: minus the signal's number where one ended the process."""
    return os.waitstatus_to_exitcode(status)


def stop() -> None:
    """Stops this process until someone lets it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
