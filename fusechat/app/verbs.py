"""The commands by name: where each lives, what it is for, and how it is typed."""

from __future__ import annotations

import ast
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fusechat.app import disk, ending, streams
from fusechat.app.errors import UserError

PACKAGE = Path(__file__).parents[1]
VERBS = {  # in the order of a run
    "new": "fusechat.new.__main__",
    "pipeline": "fusechat.pipeline.__main__",
    "tiny": "fusechat.tiny.__main__",
    "preview": "fusechat.preview.__main__",
    "extract": "fusechat.extract.__main__",
    "align": "fusechat.align.__main__",
    "train": "fusechat.fusion.__main__",
    "merge": "fusechat.merging.__main__",
    "merge_search": "fusechat.merge_search",
    "mutual": "fusechat.mutual.__main__",
    "evaluate": "fusechat.evaluate.__main__",
    "report": "fusechat.report.__main__",
    "compare": "fusechat.compare",
    "judge": "fusechat.judge.__main__",
    "publish": "fusechat.publish.__main__",
    "inspect": "fusechat.inspect",
    "status": "fusechat.status",
}
WITHOUT_CONFIG = ("new", "inspect", "status")  # verbs that compose no config
COMMAND = re.compile(rf"python (?:-m fusechat\.({'|'.join(VERBS)})|(train|merge)\.py)\b")
STARTED = "FUSECHAT_STARTED"  # set where the console script was typed: messages then say `fusechat verb`


def module_of(verb: str) -> str:
    """What ``python -m`` runs."""
    return VERBS[verb].removesuffix(".__main__")


def file_of(verb: str) -> Path:
    """The command's source."""
    return PACKAGE.joinpath(*VERBS[verb].split(".")[1:]).with_suffix(".py")


def about(verb: str) -> str:
    """The first line of the command's docstring; nothing is imported."""
    return (ast.get_docstring(ast.parse(file_of(verb).read_text(encoding="utf-8"))) or "").partition("\n")[0]


def typed(verb: str) -> str:
    """How the command is typed here: ``fusechat train`` where it was begun so, else ``python train.py``."""
    if os.environ.get(STARTED):
        return f"fusechat {verb}"
    script = Path(f"{verb}.py").absolute()  # where it works from this folder
    is_here = script.is_file() and script.parent == PACKAGE.parent
    return f"python {script.name}" if is_here else f"python -m {module_of(verb)}"


def as_typed(text: str) -> str:
    """A text whose commands (``python -m fusechat.x``, ``python train.py``) are as they are typed here."""
    return re.sub(COMMAND, lambda found: typed(found[1] or found[2]), text)


def near(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """``; did you mean a or b?``, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def plainly(run: Callable[[], None]) -> None:
    """Runs a command: a mistake is one line, and so are a full disk and what Ctrl-C ends; nobody reads: no word."""
    try:
        with disk.told(), streams.read(), ending.heeded():
            run()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {as_typed(str(error))}", file=sys.stderr)
        sys.exit(1)


def command_line(verb: str = "") -> str:
    """The command that runs now, as it could be typed again here: of a sweep, the one job; nothing that is Hydra's own.

    verb: the command's, where it was not started by Hydra.
    """
    from fusechat.app.hints import config_folders, task_overrides

    if "hydra" in sys.modules:
        from hydra.core.hydra_config import HydraConfig

        if HydraConfig.initialized():
            job = HydraConfig.get()
            folders = [part for folder in config_folders() for part in ("--config-dir", os.path.relpath(folder))]
            given = [text.replace("\\{", "{").replace("\\}", "}") for text in task_overrides()]  # a sweep escapes
            return f"{typed(job.job.config_name)} {shlex.join([*given, *folders])}".rstrip()
    return typed(verb) if verb else shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
