"""Run all stages of an experiment in order, skipping what is there and fits.

python -m fusechat.pipeline experiment=tiny
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusechat.app import door
from fusechat.app.command import PARENT, entry
from fusechat.app.errors import HELD, UserError
from fusechat.app.hints import config_folders, task_overrides, with_near_names
from fusechat.app.session import Ended
from fusechat.app.verbs import VERBS, module_of, near, typed

LOG = logging.getLogger(__name__)
STEPS = [verb for verb in VERBS if verb not in ("pipeline", "inspect")]
HYDRA = ["hydra.output_subdir=null"]  # no folder of Hydra's own; a log beside the metrics
HYDRA += [f"hydra.{key}=${{paths.logs}}/commands" for key in ("run.dir", "sweep.dir")] + ["hydra.sweep.subdir=."]
GRACE = 60.0  # seconds in which a step may end by itself after Ctrl-C; a training writes a checkpoint
Step = tuple[str, list[str]]  # a verb and its overrides


def run(cfg: DictConfig) -> None:
    """Every line of ``pipeline.steps`` is a command with overrides, run as a process of its own.

    So no result depends on what ran before. Commas make a sweep, as on the command line. The pipeline is one process:
    training starts ranks, extraction a process for each device, all else is one process. Raises `UserError` that names
    the step where one fails; the step itself has told the cause.
    """
    _alone()
    own, options = _given()
    lines = [str(line) for line in OmegaConf.to_container(cfg.pipeline.steps, resolve=False)]  # type: ignore[union-attr]
    check(lines, own)
    steps = [parse(line) for line in lines]
    started = time.perf_counter()
    for number, (verb, overrides) in enumerate(steps, 1):
        sweep = ["-m"] if is_sweep(overrides) else []
        shown = f"{typed(verb)} {shlex.join([*sweep, *own, *overrides, *options])}"
        LOG.info("[%d/%d] %s", number, len(steps), shown)
        command = [sys.executable, "-m", module_of(verb), *sweep, *own, *overrides, *options, *HYDRA]
        if code := run_child(command):
            raise UserError(f"step {number} of {len(steps)} {_ended(code)}: {shown}", code=code if code == HELD else 1)
    LOG.info("pipeline finished in %.0f s", time.perf_counter() - started)


def parse(line: str) -> Step:
    """``train source=a,b`` -> verb and overrides. Raises `UserError` for an unknown verb."""
    try:
        verb, *overrides = shlex.split(line)
    except ValueError as error:
        raise UserError(f"pipeline.steps: {line!r} cannot be read ({error}); close its quotes") from error
    if verb not in STEPS:
        raise UserError(f"pipeline.steps: {verb!r} is no stage; use one of: {', '.join(STEPS)}{near(verb, STEPS)}")
    return verb, overrides


def check(lines: Sequence[str], own: Sequence[str]) -> None:
    """Raises `UserError` that names the step where the config of one of its jobs is wrong. own: what all are given."""
    from hydra import compose

    checked = set()
    for number, line in enumerate(lines, 1):
        for verb, overrides in expand(line):
            settings = (verb, *(override for override in overrides if not override.startswith("model=")))
            if settings in checked:  # composing takes a sixth of a second, and any path may be a model's
                continue
            checked.add(settings)
            try:
                door.check_config(compose(verb, [*own, *overrides]), config_folders())
            except (UserError, HydraException, OmegaConfBaseException) as error:
                raise UserError(f"step {number} ({line.strip()}): {with_near_names(error)}") from error


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether an override has several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(list(overrides)))


def expand(line: str) -> list[Step]:
    """``train source=a,b seed=1`` -> one command per combination, in the order and writing of a grid sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    verb, overrides = parse(line)
    choices = []
    for override, text in zip(OverridesParser.create().parse_overrides(overrides), overrides, strict=True):
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [(verb, list(combination)) for combination in itertools.product(*choices)]


def run_child(command: Sequence[str]) -> int:
    """Runs a command to its end, output passed through, and returns its exit code. Ctrl-C ends it too."""
    child = subprocess.Popen(command, env=os.environ | {PARENT: str(os.getpid())})
    try:
        code = child.wait()
    except BaseException as error:
        if isinstance(error, Ended) and error.code == 128 + signal.SIGTERM:
            child.terminate()  # only this process has got it
        _end(child)
        raise
    if code in (130, -signal.SIGINT):
        raise Ended(signal.SIGINT)
    return code


def _end(child: subprocess.Popen[bytes]) -> None:
    """A terminal's Ctrl-C reaches the child as well: it has a while to end by itself."""
    for stop in (child.terminate, child.kill):
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            stop()
    child.wait()


def _alone() -> None:
    """Raises `UserError` where a launcher has started several pipelines, which would write over each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"the pipeline is one process, this is one of WORLD_SIZE={os.environ['WORLD_SIZE']}: start it without "
            "torchrun; trainer.devices and extract.trainer.devices say what training and extraction start"
        )


def _given() -> tuple[list[str], list[str]]:
    """What the pipeline was given and passes on: overrides, and options."""
    kept = [o for o in task_overrides() if not o.lstrip("+~").startswith("pipeline")]
    return kept, [part for folder in config_folders() for part in ("--config-dir", str(folder))]


def _ended(code: int) -> str:
    return f"failed (exit code {code})" if code > 0 else f"was ended by signal {-code} ({signal.Signals(-code).name})"


main = entry("pipeline")(run)
if __name__ == "__main__":
    main()
